//! The merged file tree of an image, in memory, without file bodies.
//!
//! Layers are applied in order, lowest first, between [`Tree::begin_layer`] calls. A layer's
//! whiteouts hide what lower layers put there and never what the layer itself brings, wherever in
//! its archive they stand: each directory entry remembers the layer that last touched it.
//!
//! Names are resolved inside the tree the way container runtimes do: a symbolic link in the middle
//! of a path is followed, with `/` and `..` meaning the image's root; one at the end is not. The
//! host's file system is never involved.
//!
//! Everything is counted and bounded, and nothing recurses: a hostile archive can make the tree as
//! deep as it has entries.

use std::collections::BTreeMap;
use std::mem;

/// Most files, directories and links of an image.
pub const NODES_MAX: usize = 2_000_000;

/// Most bytes of names, link targets, extended attributes and file tails held for an image.
pub const METADATA_BYTES_MAX: usize = 512 << 20;

/// Longest file name (Linux NAME_MAX).
pub const NAME_BYTES_MAX: usize = 255;

/// Longest path and link target (Linux PATH_MAX, less its NUL).
pub const PATH_BYTES_MAX: usize = 4095;

/// Most symbolic links followed for one path (Linux MAXSYMLINKS).
const HOPS_MAX: usize = 40;

/// Mode of directories that no layer describes.
const DEFAULT_DIRECTORY_MODE: u16 = 0o755;

/// A node of one tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(u32);

impl NodeId {
    /// The root directory, which every tree has.
    pub const ROOT: Self = Self(0);

    /// Dense from 0, to index a table by node.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What stat(2) says of any file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since 1970.
    pub mtime_s: i64,
    /// Its nanoseconds.
    pub mtime_ns: u32,
    /// Extended attributes, by full name.
    pub xattrs: Box<[Xattr]>,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xattr {
    /// Full name, such as `security.capability`.
    pub name: Box<[u8]>,
    /// Its value.
    pub value: Box<[u8]>,
}

/// Where the bytes of a file are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Body {
    /// Its length.
    pub size_bytes: u64,
    /// The block of the image file where it starts; meaningless if it is all tail.
    pub block: u32,
    /// What follows the last full block, if it was kept back; else it is in a block of its own.
    pub tail: Option<Box<[u8]>>,
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory and its entries, by name.
    Directory(BTreeMap<Box<[u8]>, Child>),
    /// A regular file.
    File(Body),
    /// A symbolic link and its target.
    Symlink(Box<[u8]>),
    /// A character device: major and minor number.
    CharDevice(u32, u32),
    /// A block device: major and minor number.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// A directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Child {
    /// What it names.
    pub node: NodeId,
    /// The layer that last put it there or something below it.
    touched: u32,
}

/// A file, directory or link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Mode, owner, time, attributes.
    pub meta: Meta,
    /// What it is.
    pub kind: Kind,
    /// Directory entries that name it. Always 1 for a directory.
    pub links: u32,
    /// The layer whose archive described it; for a directory, last.
    described: u32,
}

impl Node {
    /// A node that nothing names yet.
    pub fn new(kind: Kind, meta: Meta) -> Self {
        Self { meta, kind, links: 0, described: 0 }
    }

    fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory(_))
    }

    /// What counts against [`METADATA_BYTES_MAX`], besides its name.
    fn metadata_bytes(&self) -> usize {
        let own = match &self.kind {
            Kind::Symlink(target) => target.len(),
            Kind::File(body) => body.tail.as_ref().map_or(0, |tail| tail.len()),
            _ => 0,
        };
        let xattrs = self.meta.xattrs.iter();
        own + xattrs.map(|xattr| xattr.name.len() + xattr.value.len()).sum::<usize>()
    }
}

/// A place for an entry: a directory and a name in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'a> {
    /// The directory.
    pub directory: NodeId,
    /// The name, valid as a file name.
    pub name: &'a [u8],
}

/// The tree.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    /// Slots of removed nodes, to be used again.
    free: Vec<NodeId>,
    /// Bodies of removed files, until [`Tree::take_dead`].
    dead: Vec<Body>,
    layer: u32,
    metadata_bytes: usize,
}

impl Tree {
    /// An empty root directory, 0755, owned by root.
    pub fn new() -> Self {
        let mut root = default_directory();
        root.links = 1;
        Self { nodes: vec![root], free: Vec::new(), dead: Vec::new(), layer: 0, metadata_bytes: 0 }
    }

    /// What follows comes from the next layer.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// One more than the highest [`NodeId::index`].
    pub fn slots(&self) -> usize {
        self.nodes.len()
    }

    /// The bodies of files that were removed or replaced since the last call.
    pub fn take_dead(&mut self) -> Vec<Body> {
        mem::take(&mut self.dead)
    }

    /// Where `path` goes. Missing directories above it are made. `None` for the root itself.
    ///
    /// # Errors
    ///
    /// [`PathError`].
    pub fn place<'a>(&mut self, path: &'a [u8]) -> Result<Option<Place<'a>>, PathError> {
        let Some(Names { above, last }) = split(path)? else { return Ok(None) };
        let directory = self.directory(&above)?;
        Ok(Some(Place { directory, name: last }))
    }

    /// Where `path` is, if its directory exists. Makes nothing. `None` also for the root itself.
    ///
    /// # Errors
    ///
    /// [`PathError`].
    pub fn find<'a>(&self, path: &'a [u8]) -> Result<Option<Place<'a>>, PathError> {
        let Some(Names { above, last }) = split(path)? else { return Ok(None) };
        let mut walk = Walk::new(&above);
        while let Some(name) = walk.next_name() {
            let Some(child) = self.child(walk.at(), &name) else { return Ok(None) };
            match &self.node(child.node).kind {
                Kind::Directory(_) => walk.enter(child.node),
                Kind::Symlink(target) => walk.follow(target)?,
                _ => return Ok(None),
            }
        }
        Ok(Some(Place { directory: walk.at(), name: last }))
    }

    /// What is at `place`.
    pub fn at(&self, place: Place<'_>) -> Option<NodeId> {
        self.child(place.directory, place.name).map(|child| child.node)
    }

    /// Puts `node` at `place`. A directory is merged into one that is there; all else replaces.
    ///
    /// # Errors
    ///
    /// [`PathError::TooMany`] or [`PathError::TooMuch`].
    pub fn put(&mut self, place: Place<'_>, node: Node) -> Result<(), PathError> {
        if let Some(known) = self.at(place)
            && node.is_directory()
            && self.node(known).is_directory()
        {
            self.describe(known, node.meta)?;
            self.touch(place.directory, place.name);
            return Ok(());
        }
        let node = self.add(node)?;
        self.name(place, node)
    }

    /// Gives the root directory its mode, owner and so on.
    ///
    /// # Errors
    ///
    /// [`PathError::TooMuch`].
    pub fn put_root(&mut self, meta: Meta) -> Result<(), PathError> {
        self.describe(NodeId::ROOT, meta)
    }

    /// Makes `place` one more name of `target`, which is no directory.
    ///
    /// # Errors
    ///
    /// [`PathError::LinkToDirectory`], or as [`Tree::put`].
    pub fn link(&mut self, place: Place<'_>, target: NodeId) -> Result<(), PathError> {
        if self.node(target).is_directory() {
            return Err(PathError::LinkToDirectory);
        }
        if self.at(place) == Some(target) {
            self.touch(place.directory, place.name);
            return Ok(());
        }
        self.name(place, target)
    }

    /// Hides what lower layers have at `place`.
    pub fn white_out(&mut self, place: Place<'_>) {
        let Some(child) = self.child(place.directory, place.name) else { return };
        if child.touched < self.layer {
            self.remove(place);
        } else if self.node(child.node).is_directory() {
            self.prune(child.node);
            // Lower layers' description of it is hidden too.
            let node = &mut self.nodes[child.node.index()];
            if node.described < self.layer {
                self.metadata_bytes -= node.metadata_bytes();
                node.meta = default_directory().meta;
            }
        }
    }

    /// Hides what lower layers have in `directory`.
    pub fn make_opaque(&mut self, directory: NodeId) {
        self.prune(directory);
    }

    /// Removes below `directory` all that this layer has not touched.
    fn prune(&mut self, directory: NodeId) {
        let mut todo = vec![directory];
        while let Some(directory) = todo.pop() {
            let Kind::Directory(children) = &self.node(directory).kind else { continue };
            let mut lower = Vec::new();
            for (name, child) in children {
                if child.touched < self.layer {
                    lower.push(name.clone());
                } else if self.node(child.node).is_directory() {
                    todo.push(child.node);
                }
            }
            for name in lower {
                self.remove(Place { directory, name: &name });
            }
        }
    }

    /// The directory `above` leads to, made as far as it is missing and marked as this layer's.
    fn directory(&mut self, above: &[&[u8]]) -> Result<NodeId, PathError> {
        let mut walk = Walk::new(above);
        while let Some(name) = walk.next_name() {
            let place = Place { directory: walk.at(), name: &name };
            let Some(child) = self.child(place.directory, place.name) else {
                self.put(place, default_directory())?;
                let made = self.at(place).expect("it was put there on the line above");
                walk.enter(made);
                continue;
            };
            match &self.node(child.node).kind {
                Kind::Directory(_) => {
                    self.touch(place.directory, place.name);
                    walk.enter(child.node);
                }
                Kind::Symlink(target) => walk.follow(target)?,
                // An upper layer's directory hides a lower layer's file.
                _ if child.touched < self.layer => {
                    let made = self.add(default_directory())?;
                    self.name(place, made)?;
                    walk.enter(made);
                }
                _ => return Err(PathError::NotADirectory),
            }
        }
        Ok(walk.at())
    }

    fn child(&self, directory: NodeId, name: &[u8]) -> Option<Child> {
        match &self.node(directory).kind {
            Kind::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    fn children_mut(&mut self, directory: NodeId) -> &mut BTreeMap<Box<[u8]>, Child> {
        match &mut self.nodes[directory.index()].kind {
            Kind::Directory(children) => children,
            _ => unreachable!("a place's directory is a directory: see `place` and `find`"),
        }
    }

    fn touch(&mut self, directory: NodeId, name: &[u8]) {
        let layer = self.layer;
        if let Some(child) = self.children_mut(directory).get_mut(name) {
            child.touched = layer;
        }
    }

    fn describe(&mut self, id: NodeId, meta: Meta) -> Result<(), PathError> {
        let layer = self.layer;
        let node = &mut self.nodes[id.index()];
        let before = node.metadata_bytes();
        node.meta = meta;
        node.described = layer;
        let after = node.metadata_bytes();
        self.metadata_bytes -= before;
        self.count(after)
    }

    fn add(&mut self, mut node: Node) -> Result<NodeId, PathError> {
        self.count(node.metadata_bytes())?;
        node.described = self.layer;
        if let Some(id) = self.free.pop() {
            self.nodes[id.index()] = node;
            return Ok(id);
        }
        if self.nodes.len() >= NODES_MAX {
            return Err(PathError::TooMany);
        }
        let id = NodeId(u32::try_from(self.nodes.len()).map_err(|_| PathError::TooMany)?);
        self.nodes.push(node);
        Ok(id)
    }

    /// Makes `place` name `node`, and nothing else any more.
    fn name(&mut self, place: Place<'_>, node: NodeId) -> Result<(), PathError> {
        self.count(place.name.len())?;
        // First the new link, then the old one away: what is removed may contain the target.
        self.nodes[node.index()].links += 1;
        self.remove(place);
        let child = Child { node, touched: self.layer };
        self.children_mut(place.directory).insert(place.name.into(), child);
        Ok(())
    }

    /// Removes an entry and all below it. Files that have other names stay.
    fn remove(&mut self, place: Place<'_>) {
        let Some(child) = self.children_mut(place.directory).remove(place.name) else { return };
        self.metadata_bytes -= place.name.len();
        let mut todo = vec![child.node];
        while let Some(id) = todo.pop() {
            let node = &mut self.nodes[id.index()];
            node.links -= 1;
            if node.links > 0 {
                continue;
            }
            self.metadata_bytes -= node.metadata_bytes();
            match mem::replace(&mut node.kind, Kind::Fifo) {
                Kind::Directory(children) => {
                    self.metadata_bytes -= children.keys().map(|name| name.len()).sum::<usize>();
                    todo.extend(children.values().map(|child| child.node));
                }
                Kind::File(body) => self.dead.push(body),
                Kind::Symlink(_) | Kind::CharDevice(..) | Kind::BlockDevice(..) | Kind::Fifo => {}
            }
            node.meta = Meta::default();
            self.free.push(id);
        }
    }

    fn count(&mut self, bytes: usize) -> Result<(), PathError> {
        self.metadata_bytes += bytes;
        if self.metadata_bytes > METADATA_BYTES_MAX {
            return Err(PathError::TooMuch);
        }
        Ok(())
    }
}

fn default_directory() -> Node {
    let meta = Meta { mode: DEFAULT_DIRECTORY_MODE, ..Meta::default() };
    Node::new(Kind::Directory(BTreeMap::new()), meta)
}

/// The names in a path.
struct Names<'a> {
    above: Vec<&'a [u8]>,
    last: &'a [u8],
}

/// The names above the last one, and the last one. `None` if there is none: the root.
///
/// A leading `/` and `.` components say nothing. `..` has no place in a layer.
fn split(path: &[u8]) -> Result<Option<Names<'_>>, PathError> {
    if path.len() > PATH_BYTES_MAX {
        return Err(PathError::PathTooLong);
    }
    let mut names = Vec::new();
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(PathError::DotDot),
            name if name.len() > NAME_BYTES_MAX => return Err(PathError::NameTooLong),
            name if name.contains(&0) => return Err(PathError::Nul),
            name => names.push(name),
        }
    }
    Ok(names.pop().map(|last| Names { above: names, last }))
}

/// A walk down the tree, one name after the other.
struct Walk {
    /// Names still to go, next one last.
    todo: Vec<Box<[u8]>>,
    /// Directories from the root to here.
    above: Vec<NodeId>,
    hops: usize,
}

impl Walk {
    fn new(names: &[&[u8]]) -> Self {
        let todo = names.iter().rev().map(|&name| name.into()).collect();
        Self { todo, above: vec![NodeId::ROOT], hops: 0 }
    }

    fn at(&self) -> NodeId {
        *self.above.last().expect("the root is never popped")
    }

    /// The next name to look up; goes up by itself.
    fn next_name(&mut self) -> Option<Box<[u8]>> {
        loop {
            let name = self.todo.pop()?;
            match &*name {
                b"" | b"." => {}
                b".." if self.above.len() > 1 => drop(self.above.pop()),
                b".." => {}
                _ => return Some(name),
            }
        }
    }

    fn enter(&mut self, directory: NodeId) {
        self.above.push(directory);
    }

    fn follow(&mut self, target: &[u8]) -> Result<(), PathError> {
        self.hops += 1;
        if self.hops > HOPS_MAX {
            return Err(PathError::Loop);
        }
        if target.first() == Some(&b'/') {
            self.above.truncate(1);
        }
        for name in target.rsplit(|&byte| byte == b'/') {
            if name.len() > NAME_BYTES_MAX {
                return Err(PathError::NameTooLong);
            }
            self.todo.push(name.into());
        }
        Ok(())
    }
}

/// Why a path or an entry is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It climbs.
    #[error("It has a `..` component")]
    DotDot,
    /// A component cannot be a file name.
    #[error("A component is longer than {NAME_BYTES_MAX} bytes")]
    NameTooLong,
    /// No program could open it.
    #[error("It is longer than {PATH_BYTES_MAX} bytes")]
    PathTooLong,
    /// A component cannot be a file name.
    #[error("A component has a NUL byte")]
    Nul,
    /// A file stands where the same layer needs a directory.
    #[error("A component is not a directory")]
    NotADirectory,
    /// Symbolic links lead nowhere.
    #[error("More than {HOPS_MAX} symbolic links on the way")]
    Loop,
    /// Only files have several names.
    #[error("It is a hard link to a directory")]
    LinkToDirectory,
    /// The image has too many files.
    #[error("The image has more than {NODES_MAX} files")]
    TooMany,
    /// The image's names and attributes are too much to hold.
    #[error("The image has more than {METADATA_BYTES_MAX} bytes of names and attributes")]
    TooMuch,
}

#[cfg(test)]
mod tests;
