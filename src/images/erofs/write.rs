//! Carries the plan out: directory blocks, then inodes, in one pass each.

use std::io::{self, Write};

use crate::images::erofs::format::{DataLayout, SLOT_BYTES};
use crate::images::erofs::format::{Dirent, file_type, push_directory_block, push_inode};
use crate::images::erofs::plan::{DirectoryBlocks, Plan, entries, tail_bytes};
use crate::images::erofs::{BLOCK, BLOCK_BYTES};
use crate::images::tree::{Kind, NodeId, Tree};

/// Writes the blocks of all directories that have some.
pub(super) fn directories(out: &mut impl Write, tree: &Tree, plan: &Plan) -> io::Result<()> {
    for &id in &plan.with_blocks {
        let (mut bytes, last_block) = directory(tree, plan, id);
        let spec = plan.inode(tree, id);
        match spec.layout {
            DataLayout::Inline => bytes.truncate(last_block),
            DataLayout::Plain => bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0),
        }
        out.write_all(&bytes)?;
    }
    Ok(())
}

/// Writes all inodes, up to the end of their last block.
pub(super) fn inodes(out: &mut impl Write, tree: &Tree, plan: &Plan) -> io::Result<()> {
    let mut offset = 0_u64;
    let mut bytes = Vec::with_capacity(BLOCK_BYTES);
    for &id in &plan.order {
        let node = tree.node(id);
        let spec = plan.inode(tree, id);
        let start = plan.slot(id) * SLOT_BYTES as u64;
        zeros(out, start - offset)?;
        bytes.clear();
        push_inode(&mut bytes, node, &spec);
        match &node.kind {
            Kind::Symlink(target) => bytes.extend(&**target),
            Kind::File(body) => bytes.extend(body.tail.as_deref().unwrap_or_default()),
            Kind::Directory(_) if tail_bytes(node, &spec) > 0 => {
                let (entries, last_block) = directory(tree, plan, id);
                bytes.extend(&entries[last_block..]);
            }
            _ => {}
        }
        out.write_all(&bytes)?;
        offset = start + bytes.len() as u64;
    }
    zeros(out, offset.next_multiple_of(BLOCK) - offset)
}

/// All bytes of a directory, and where its last block starts.
fn directory(tree: &Tree, plan: &Plan, id: NodeId) -> (Vec<u8>, usize) {
    let Kind::Directory(children) = &tree.node(id).kind else { return (Vec::new(), 0) };
    let parent = plan.directory(id).parent;
    let mut out = Vec::new();
    let mut blocks = DirectoryBlocks::default();
    let mut block = Vec::new();
    for (name, node) in entries(children) {
        if blocks.add(name) {
            push_directory_block(&mut out, &block);
            out.resize(out.len().next_multiple_of(BLOCK_BYTES), 0);
            block.clear();
        }
        let node = node.unwrap_or(if name == b"." { id } else { parent });
        let file_type = file_type(&tree.node(node).kind);
        block.push(Dirent { name, slot: plan.slot(node), file_type });
    }
    let last_block = out.len();
    push_directory_block(&mut out, &block);
    (out, last_block)
}

fn zeros(out: &mut impl Write, bytes: u64) -> io::Result<()> {
    io::copy(&mut io::Read::take(io::repeat(0), bytes), out).map(drop)
}
