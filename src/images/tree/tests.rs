//! Layering rules on the tree alone; `layers/tests.rs` has them from the archive's side.

use super::*;

fn meta(mode: u16) -> Meta {
    Meta { mode, ..Meta::default() }
}

fn dir(mode: u16) -> Node {
    Node::new(Kind::Directory(BTreeMap::new()), meta(mode))
}

fn file(block: u32) -> Node {
    Node::new(Kind::File(Body { size_bytes: 4096, block, tail: None }), meta(0o644))
}

fn symlink(target: &str) -> Node {
    Node::new(Kind::Symlink(target.as_bytes().into()), meta(0o777))
}

fn put(tree: &mut Tree, path: &str, node: Node) {
    let place = tree.place(path.as_bytes()).unwrap().unwrap();
    tree.put(place, node).unwrap();
}

fn white_out(tree: &mut Tree, path: &str) {
    if let Some(place) = tree.find(path.as_bytes()).unwrap() {
        tree.white_out(place);
    }
}

/// All paths, with the block of files and the mode of directories.
fn listing(tree: &Tree) -> Vec<String> {
    let mut todo = vec![(String::new(), NodeId::ROOT)];
    let mut found = Vec::new();
    while let Some((path, id)) = todo.pop() {
        if let Kind::Directory(children) = &tree.node(id).kind {
            for (name, child) in children {
                let path = format!("{path}/{}", String::from_utf8_lossy(name));
                let node = tree.node(child.node);
                found.push(match &node.kind {
                    Kind::Directory(_) => format!("{path} {:o}", node.meta.mode),
                    Kind::File(body) => format!("{path} #{}", body.block),
                    Kind::Symlink(target) => format!("{path} -> {}", target.escape_ascii()),
                    other => format!("{path} {other:?}"),
                });
                todo.push((path, child.node));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn missing_parents_are_made() {
    let mut tree = Tree::new();
    tree.begin_layer();

    put(&mut tree, "/a/./b//c", file(1));

    assert_eq!(listing(&tree), ["/a 755", "/a/b 755", "/a/b/c #1"]);
}

#[test]
fn a_directory_is_merged_and_described_anew() {
    let mut tree = Tree::new();
    tree.begin_layer();
    put(&mut tree, "a", dir(0o700));
    put(&mut tree, "a/low", file(1));
    tree.begin_layer();

    put(&mut tree, "a", dir(0o751));

    assert_eq!(listing(&tree), ["/a 751", "/a/low #1"]);
}

#[test]
fn files_and_directories_replace_each_other() {
    let mut tree = Tree::new();
    tree.begin_layer();
    put(&mut tree, "a/f", file(1));
    put(&mut tree, "b", file(2));
    tree.begin_layer();

    put(&mut tree, "a", file(3));
    put(&mut tree, "b/g", file(4));

    assert_eq!(listing(&tree), ["/a #3", "/b 755", "/b/g #4"]);
    let dead: Vec<u32> = tree.take_dead().iter().map(|body| body.block).collect();
    assert_eq!(dead, [1, 2]);
}

#[test]
fn a_layers_own_file_is_no_directory() {
    let mut tree = Tree::new();
    tree.begin_layer();
    put(&mut tree, "a", file(1));

    assert_eq!(tree.place(b"a/b"), Err(PathError::NotADirectory));
}

#[test]
fn a_whiteout_hides_lower_layers_only_wherever_it_stands() {
    for whiteout_first in [true, false] {
        let mut tree = Tree::new();
        tree.begin_layer();
        put(&mut tree, "d", dir(0o700));
        put(&mut tree, "d/low", file(1));
        put(&mut tree, "d/sub/low", file(2));
        tree.begin_layer();

        if whiteout_first {
            white_out(&mut tree, "d");
        }
        put(&mut tree, "d/sub/up", file(3));
        if !whiteout_first {
            white_out(&mut tree, "d");
        }

        assert_eq!(listing(&tree), ["/d 755", "/d/sub 755", "/d/sub/up #3"], "{whiteout_first}");
    }
}

#[test]
fn an_opaque_directory_keeps_what_its_layer_brings() {
    let mut tree = Tree::new();
    tree.begin_layer();
    put(&mut tree, "d/low", file(1));
    put(&mut tree, "d/both/low", file(2));
    tree.begin_layer();
    put(&mut tree, "d", dir(0o750));
    put(&mut tree, "d/before", file(3));
    put(&mut tree, "d/both", dir(0o711));

    let place = tree.find(b"d/.wh..wh..opq").unwrap().unwrap();
    tree.make_opaque(place.directory);
    put(&mut tree, "d/after", file(4));

    assert_eq!(listing(&tree), ["/d 750", "/d/after #4", "/d/before #3", "/d/both 711"]);
}

#[test]
fn a_whiteout_of_nothing_makes_nothing() {
    let mut tree = Tree::new();
    tree.begin_layer();

    white_out(&mut tree, "no/such/file");

    assert_eq!(listing(&tree), [""; 0]);
}

#[test]
fn links_above_the_last_component_are_followed_inside_the_image() {
    let mut tree = Tree::new();
    tree.begin_layer();
    put(&mut tree, "usr/lib", dir(0o755));
    put(&mut tree, "lib", symlink("usr/lib"));
    put(&mut tree, "abs", symlink("/usr/../../usr/lib"));
    put(&mut tree, "var/run", symlink("/run"));
    tree.begin_layer();

    put(&mut tree, "lib/a", file(1));
    put(&mut tree, "abs/b", file(2));
    put(&mut tree, "var/run/pid", file(3));

    assert_eq!(
        listing(&tree),
        [
            "/abs -> /usr/../../usr/lib",
            "/lib -> usr/lib",
            "/run 755",
            "/run/pid #3",
            "/usr 755",
            "/usr/lib 755",
            "/usr/lib/a #1",
            "/usr/lib/b #2",
            "/var 755",
            "/var/run -> /run",
        ]
    );
}

#[test]
fn a_link_at_the_end_is_replaced_not_followed() {
    let mut tree = Tree::new();
    tree.begin_layer();
    put(&mut tree, "etc/passwd", file(1));
    put(&mut tree, "link", symlink("etc/passwd"));
    put(&mut tree, "dir", symlink("etc"));
    tree.begin_layer();

    put(&mut tree, "link", file(2));
    put(&mut tree, "dir", dir(0o755));
    put(&mut tree, "dir/x", file(3));

    assert_eq!(listing(&tree), ["/dir 755", "/dir/x #3", "/etc 755", "/etc/passwd #1", "/link #2"]);
}

#[test]
fn links_that_lead_nowhere_are_refused() {
    let mut tree = Tree::new();
    tree.begin_layer();
    put(&mut tree, "a", symlink("b"));
    put(&mut tree, "b", symlink("a"));
    put(&mut tree, "self", symlink("self/self"));

    assert_eq!(tree.place(b"a/x"), Err(PathError::Loop));
    assert_eq!(tree.place(b"self/x"), Err(PathError::Loop));
    assert_eq!(tree.find(b"a/.wh.x"), Err(PathError::Loop));
}

#[test]
fn impossible_paths_are_refused() {
    let mut tree = Tree::new();
    let long_name = [b'n'; NAME_BYTES_MAX + 1];
    let long_path = b"d/".repeat(PATH_BYTES_MAX);

    assert_eq!(tree.place(b"a/../../etc/passwd"), Err(PathError::DotDot));
    assert_eq!(tree.place(b".."), Err(PathError::DotDot));
    assert_eq!(tree.place(&long_name), Err(PathError::NameTooLong));
    assert_eq!(tree.place(&long_path), Err(PathError::PathTooLong));
    assert_eq!(tree.place(b"a\0b"), Err(PathError::Nul));
    assert_eq!(tree.place(b"./"), Ok(None));
    assert_eq!(tree.place(b"/"), Ok(None));
}

#[test]
fn a_hard_link_is_one_more_name() {
    let mut tree = Tree::new();
    tree.begin_layer();
    put(&mut tree, "a", file(1));
    tree.begin_layer();
    let target = tree.find(b"a").unwrap().and_then(|place| tree.at(place)).unwrap();

    let place = tree.place(b"d/b").unwrap().unwrap();
    tree.link(place, target).unwrap();
    white_out(&mut tree, "a");

    assert_eq!(listing(&tree), ["/d 755", "/d/b #1"]);
    assert_eq!(tree.node(target).links, 1);
    assert_eq!(tree.take_dead(), []);
    white_out(&mut tree, "d/b");
    assert_eq!(listing(&tree), ["/d 755", "/d/b #1"], "a layer does not hide its own link");
}

/// The new name may stand where the target's own directory was.
#[test]
fn a_hard_link_may_replace_what_held_its_target() {
    let mut tree = Tree::new();
    tree.begin_layer();
    put(&mut tree, "d/f", file(1));
    let target = tree.find(b"d/f").unwrap().and_then(|place| tree.at(place)).unwrap();

    let place = tree.place(b"d").unwrap().unwrap();
    tree.link(place, target).unwrap();
    tree.link(place, target).unwrap();

    assert_eq!(listing(&tree), ["/d #1"]);
    assert_eq!(tree.node(target).links, 1);
}

#[test]
fn a_directory_has_one_name() {
    let mut tree = Tree::new();
    tree.begin_layer();
    let place = tree.place(b"d").unwrap().unwrap();

    assert_eq!(tree.link(place, NodeId::ROOT), Err(PathError::LinkToDirectory));
}

/// Each link lengthens a path by as much as a path can hold: the tree gets deeper than any stack.
#[test]
fn depth_is_bounded_by_nothing_but_entries() {
    let mut tree = Tree::new();
    tree.begin_layer();
    let step = "d/".repeat(1000);
    put(&mut tree, &format!("{step}s"), file(1));
    for round in 1..30 {
        put(
            &mut tree,
            &format!("l{round}"),
            symlink(&if round == 1 { step.clone() } else { format!("l{}/{step}", round - 1) }),
        );
        put(&mut tree, &format!("l{round}/{step}s"), file(round));
    }
    tree.begin_layer();

    white_out(&mut tree, "d");

    assert_eq!(listing(&tree).len(), 29, "only the links are left");
    assert_eq!(tree.take_dead().len(), 30);
}

#[test]
fn slots_of_removed_files_are_used_again() {
    let mut tree = Tree::new();
    for round in 0..100 {
        tree.begin_layer();
        put(&mut tree, "a/b/c", file(round));
        put(&mut tree, "a", file(round));
    }

    assert!(tree.slots() < 10, "{}", tree.slots());
    assert_eq!(tree.metadata_bytes, 1);
}

#[test]
fn what_is_held_in_memory_is_bounded() {
    let mut tree = Tree::new();
    tree.begin_layer();
    let value = vec![0_u8; 1 << 20].into_boxed_slice();
    let mut result = Ok(());
    for index in 0..600 {
        let xattr = Xattr { name: b"user.a"[..].into(), value: value.clone() };
        let mut node = file(1);
        node.meta.xattrs = Box::new([xattr]);
        let name = format!("f{index}");
        let place = tree.place(name.as_bytes()).unwrap().unwrap();
        result = tree.put(place, node);
        if result.is_err() {
            break;
        }
    }

    assert_eq!(result, Err(PathError::TooMuch));
}
