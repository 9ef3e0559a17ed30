//! The plan: where each inode and each directory block will be, before any of them is written.
//!
//! Inodes are placed directory by directory, siblings together, so that listing a directory reads
//! few blocks. An inode never shares its bytes with a block boundary unless its extended
//! attributes alone are longer than a block; tails must not (the kernel refuses them).

use std::cmp::Reverse;
use std::collections::HashMap;
use std::io;
use std::iter;

use crate::images::erofs::format::{
    DIRENT_BYTES, DataLayout, EXTENDED_BYTES, InodeSpec, SLOT_BYTES, Superblock, device_number,
    fits_compact, inode_bytes, xattr_bytes,
};
use crate::images::erofs::{BLOCK, BLOCK_BYTES};
use crate::images::tree::{Child, Kind, Node, NodeId, Tree};

/// Blocks with room left that the next inode may go to.
const OPEN_BLOCKS_MAX: usize = 8;

/// Marks a node that has no slot yet. Slot 0 is never used: 0 is no inode number.
const UNPLACED: u32 = 0;

/// The names every directory has besides its children.
const DOTS: [&[u8]; 2] = [b".", b".."];

/// Where everything goes.
#[derive(Debug)]
pub(super) struct Plan {
    /// Nodes in the order of their slots.
    pub(super) order: Vec<NodeId>,
    /// Directories that have blocks, in the order of these.
    pub(super) with_blocks: Vec<NodeId>,
    /// By node.
    slots: Vec<u32>,
    /// By directory.
    directories: HashMap<NodeId, DirectoryPlan>,
    /// The time compact inodes have.
    time: (i64, u32),
    meta_block: u32,
    end_block: u32,
}

/// Where a directory goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct DirectoryPlan {
    pub(super) parent: NodeId,
    /// Bytes of its entries, as blocks are filled.
    size_bytes: u64,
    /// First of its blocks.
    block: u32,
    subdirectories: u32,
    layout: DataLayout,
}

impl Plan {
    /// Plans `tree` behind the bodies, which end before `data_end`.
    pub(super) fn new(tree: &Tree, data_end: u32) -> io::Result<Self> {
        let mut plan = Self {
            order: Vec::new(),
            with_blocks: Vec::new(),
            slots: vec![UNPLACED; tree.slots()],
            directories: HashMap::new(),
            time: commonest_time(tree),
            meta_block: data_end,
            end_block: 0,
        };
        let mut slots = Slots::new();
        plan.measure(tree, NodeId::ROOT, NodeId::ROOT)?;
        plan.place(tree, &mut slots, NodeId::ROOT)?;
        let mut todo = vec![NodeId::ROOT];
        while let Some(directory) = todo.pop() {
            let Kind::Directory(children) = &tree.node(directory).kind else { continue };
            let first_subdirectory = todo.len();
            for child in children.values() {
                if matches!(tree.node(child.node).kind, Kind::Directory(_)) {
                    plan.measure(tree, child.node, directory)?;
                    todo.push(child.node);
                }
                plan.place(tree, &mut slots, child.node)?;
            }
            todo[first_subdirectory..].reverse();
        }
        let meta_blocks = u64::from(plan.meta_block) + slots.blocks;
        plan.end_block = u32::try_from(meta_blocks).map_err(|_| too_large())?;
        plan.order.sort_unstable_by_key(|id| plan.slots[id.index()]);
        Ok(plan)
    }

    pub(super) fn superblock(&self, uuid: [u8; 16]) -> Superblock {
        Superblock {
            root_slot: u16::try_from(self.slots[NodeId::ROOT.index()])
                .expect("the root is placed first, in the first block"),
            inodes: self.order.len() as u64,
            time: self.time,
            blocks: self.end_block,
            meta_block: self.meta_block,
            uuid,
        }
    }

    /// The slot of a node, relative to the first block of inodes.
    pub(super) fn slot(&self, id: NodeId) -> u64 {
        u64::from(self.slots[id.index()])
    }

    /// Where a directory goes.
    pub(super) fn directory(&self, id: NodeId) -> &DirectoryPlan {
        self.directories.get(&id).expect("every directory of the tree was measured")
    }

    /// The numbers of a node's inode.
    pub(super) fn inode(&self, tree: &Tree, id: NodeId) -> InodeSpec {
        let node = tree.node(id);
        let (layout, size_bytes, block) = match &node.kind {
            Kind::Directory(_) => {
                let plan = self.directory(id);
                (plan.layout, plan.size_bytes, plan.block)
            }
            Kind::File(body) if body.tail.is_some() => {
                (DataLayout::Inline, body.size_bytes, body.block)
            }
            Kind::File(body) => (DataLayout::Plain, body.size_bytes, body.block),
            Kind::Symlink(target) => (DataLayout::Inline, target.len() as u64, 0),
            &Kind::CharDevice(major, minor) | &Kind::BlockDevice(major, minor) => {
                let number = device_number(major, minor).expect("layers.rs checked it");
                (DataLayout::Plain, 0, number)
            }
            Kind::Fifo => (DataLayout::Plain, 0, 0),
        };
        let links = match &node.kind {
            Kind::Directory(_) => 2 + self.directory(id).subdirectories,
            _ => node.links,
        };
        InodeSpec {
            layout,
            size_bytes,
            links,
            block,
            number: self.slots[id.index()],
            compact: fits_compact(node, size_bytes, links, self.time),
        }
    }

    /// Sizes a directory and gives it its blocks.
    fn measure(&mut self, tree: &Tree, id: NodeId, parent: NodeId) -> io::Result<()> {
        let node = tree.node(id);
        let Kind::Directory(children) = &node.kind else { return Ok(()) };
        let mut blocks = DirectoryBlocks::default();
        for (name, _) in entries(children) {
            blocks.add(name);
        }
        let is_directory =
            |child: &&Child| matches!(tree.node(child.node).kind, Kind::Directory(_));
        let subdirectories = children.values().filter(is_directory).count();
        let inode_bytes = EXTENDED_BYTES + xattr_bytes(&node.meta.xattrs);
        let inline = inode_bytes + blocks.used_bytes <= BLOCK_BYTES;
        let own_blocks = blocks.full + u32::from(!inline);
        let plan = DirectoryPlan {
            parent,
            size_bytes: u64::from(blocks.full) * BLOCK + blocks.used_bytes as u64,
            block: self.meta_block,
            subdirectories: u32::try_from(subdirectories).map_err(|_| too_large())?,
            layout: if inline { DataLayout::Inline } else { DataLayout::Plain },
        };
        self.meta_block = self.meta_block.checked_add(own_blocks).ok_or_else(too_large)?;
        if own_blocks > 0 {
            self.with_blocks.push(id);
        }
        self.directories.insert(id, plan);
        Ok(())
    }

    /// Gives a node its slot, unless another name of it already did.
    fn place(&mut self, tree: &Tree, slots: &mut Slots, id: NodeId) -> io::Result<()> {
        if self.slots[id.index()] != UNPLACED {
            return Ok(());
        }
        let node = tree.node(id);
        let spec = self.inode(tree, id);
        let bytes =
            inode_bytes(spec.compact) + xattr_bytes(&node.meta.xattrs) + tail_bytes(node, &spec);
        self.slots[id.index()] = slots.take(bytes)?;
        self.order.push(id);
        Ok(())
    }
}

/// Bytes behind the inode and its extended attributes.
pub(super) fn tail_bytes(node: &Node, spec: &InodeSpec) -> usize {
    match (&node.kind, spec.layout) {
        (Kind::Symlink(target), _) => target.len(),
        (_, DataLayout::Inline) => {
            usize::try_from(spec.size_bytes % BLOCK).expect("less than a block")
        }
        (_, DataLayout::Plain) => 0,
    }
}

/// All names of a directory in the order EROFS wants: that of their bytes, dots among the others.
pub(super) fn entries<'a>(
    children: impl IntoIterator<Item = (&'a Box<[u8]>, &'a Child)>,
) -> impl Iterator<Item = (&'a [u8], Option<NodeId>)> {
    let mut children = children.into_iter().map(|(name, child)| (&**name, child.node)).peekable();
    let mut dots = DOTS.into_iter().peekable();
    iter::from_fn(move || match (children.peek(), dots.peek()) {
        (Some((name, _)), Some(dot)) if name < dot => {
            children.next().map(|(name, node)| (name, Some(node)))
        }
        (_, Some(_)) => dots.next().map(|dot| (dot, None)),
        (_, None) => children.next().map(|(name, node)| (name, Some(node))),
    })
}

/// How a directory's entries fall into blocks.
#[derive(Debug, Default)]
pub(super) struct DirectoryBlocks {
    /// Blocks before the current one.
    pub(super) full: u32,
    /// Bytes of the current one.
    pub(super) used_bytes: usize,
}

impl DirectoryBlocks {
    /// Adds an entry. Says whether it starts a new block.
    pub(super) fn add(&mut self, name: &[u8]) -> bool {
        let bytes = DIRENT_BYTES + name.len();
        let fits = self.used_bytes + bytes <= BLOCK_BYTES;
        if fits {
            self.used_bytes += bytes;
        } else {
            self.full += 1;
            self.used_bytes = bytes;
        }
        !fits
    }
}

/// Hands out the slots of the inode blocks.
#[derive(Debug)]
struct Slots {
    /// Blocks begun.
    blocks: u64,
    /// Blocks that are not full: number and bytes used.
    open: Vec<(u64, usize)>,
}

impl Slots {
    fn new() -> Self {
        // Slot 0 is taken: see UNPLACED.
        Self { blocks: 1, open: vec![(0, SLOT_BYTES)] }
    }

    /// The slot for `bytes` that are not split over blocks, if they fit one.
    fn take(&mut self, bytes: usize) -> io::Result<u32> {
        let bytes = bytes.next_multiple_of(SLOT_BYTES);
        let fitting =
            self.open.iter_mut().filter(|(_, used)| used.saturating_add(bytes) <= BLOCK_BYTES);
        // The fullest one that still fits; the first of equals.
        let (block, used) = match fitting.min_by_key(|(_, used)| BLOCK_BYTES - *used) {
            Some(open) => {
                let used = open.1;
                open.1 += bytes;
                (open.0, used)
            }
            None => (self.begin(bytes), 0),
        };
        let slot = (block * BLOCK + used as u64) / SLOT_BYTES as u64;
        u32::try_from(slot).map_err(|_| too_large())
    }

    /// Begins as many blocks as `bytes` need; the last one is open for more.
    fn begin(&mut self, bytes: usize) -> u64 {
        let first = self.blocks;
        self.blocks += (bytes.div_ceil(BLOCK_BYTES)) as u64;
        if self.open.len() == OPEN_BLOCKS_MAX {
            let fullest = self.open.iter().enumerate().max_by_key(|(_, (_, used))| *used);
            if let Some((fullest, _)) = fullest {
                self.open.remove(fullest);
            }
        }
        let used = bytes - (bytes.div_ceil(BLOCK_BYTES) - 1) * BLOCK_BYTES;
        self.open.push((self.blocks - 1, used));
        first
    }
}

/// The time most nodes have, so that most inodes can be compact; the earliest of equals.
fn commonest_time(tree: &Tree) -> (i64, u32) {
    let mut counts: HashMap<(i64, u32), usize> = HashMap::new();
    let mut todo = vec![NodeId::ROOT];
    while let Some(id) = todo.pop() {
        let node = tree.node(id);
        *counts.entry((node.meta.mtime_s, node.meta.mtime_ns)).or_default() += 1;
        if let Kind::Directory(children) = &node.kind {
            todo.extend(children.values().map(|child| child.node));
        }
    }
    let best = counts.into_iter().max_by_key(|&(time, count)| (count, Reverse(time)));
    best.map_or((0, 0), |(time, _)| time)
}

fn too_large() -> io::Error {
    io::ErrorKind::FileTooLarge.into()
}
