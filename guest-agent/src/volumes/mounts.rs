//! What is mounted where, in all namespaces that have a process (proc_pid_mountinfo(5)).

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use rustix::io::Errno;

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// The file system's device, as `MAJOR:MINOR`.
    number: String,
    /// Its root, as a process here sees it.
    pub(super) path: String,
    pub(super) read_only: bool,
    /// Groups of mounts that come and go together: its own, and the one it follows.
    shared: Option<String>,
    master: Option<String>,
    kind: String,
    source: String,
}

/// The mounts of this process's namespace, in their order.
///
/// # Errors
///
/// Of /proc.
pub(super) fn ours() -> io::Result<Vec<Mount>> {
    read(Path::new("/proc/self/mountinfo"))
}

/// The mounts of all other namespaces that have a process. Each is read as often as there are roots
/// in it: a process is shown what lies below its own.
///
/// # Errors
///
/// Of /proc.
pub(super) fn others() -> io::Result<Vec<Mount>> {
    let own = fs::read_link("/proc/self/ns/mnt")?;
    let mut mounts = Vec::new();
    let mut seen = BTreeSet::new();
    for process in fs::read_dir("/proc")? {
        let path = process?.path();
        // What is no process has none, and one that ends meanwhile has nothing mounted.
        let (namespace, root) =
            (fs::read_link(path.join("ns/mnt")), fs::read_link(path.join("root")));
        let (Ok(namespace), Ok(root)) = (namespace, root) else { continue };
        if namespace != own && seen.insert((namespace, root)) {
            match read(&path.join("mountinfo")) {
                Ok(others) => mounts.extend(others),
                Err(error) if has_ended(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(mounts)
}

fn read(path: &Path) -> io::Result<Vec<Mount>> {
    let text = fs::read(path)?;
    Ok(parse(&String::from_utf8_lossy(&text)).collect())
}

/// Whether it says that a process is no more.
fn has_ended(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NOENT | Errno::SRCH | Errno::INVAL))
}

fn parse(text: &str) -> impl Iterator<Item = Mount> + '_ {
    text.lines().filter_map(Mount::parse)
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let (place, what) = line.split_once(" - ")?;
        let mut place = place.split(' ');
        let mut field = || place.next();
        let (_id, _parent, number) = (field()?, field()?, field()?.to_owned());
        let (_root, path, options) = (field()?, unescaped(field()?), field()?);
        let groups: Vec<_> = place.filter_map(|tag| tag.split_once(':')).collect();
        let group = |name| {
            let found = groups.iter().find(|(tag, _)| *tag == name);
            found.map(|(_, number)| (*number).to_owned())
        };
        let mut what = what.split(' ');
        Some(Self {
            number,
            path,
            read_only: options.split(',').any(|option| option == "ro"),
            shared: group("shared"),
            master: group("master"),
            kind: what.next()?.to_owned(),
            source: unescaped(what.next()?),
        })
    }

    /// Whether it is what a disk holds, or lies in a layer above that.
    pub(super) fn is_of(&self, number: &str, device: &Path) -> bool {
        self.number == number || (self.is_layered() && Path::new(&self.source) == device)
    }

    /// Whether it is a volume with a layer.
    pub(super) fn is_layered(&self) -> bool {
        self.kind == "overlay"
    }

    /// Whether it goes with `other`, which is in another namespace: it is there by the same path,
    /// and what happens to the one happens to the other.
    pub(super) fn follows(&self, other: &Self) -> bool {
        let group = other.shared.as_ref();
        self.path == other.path
            && group.is_some()
            && (self.shared.as_ref() == group || self.master.as_ref() == group)
    }
}

/// A path as it is: spaces, tabs, newlines and backslashes are written as three octal digits.
fn unescaped(path: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(path.to_owned(), |path, (escaped, plain)| path.replace(escaped, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mounts_of_a_disk_are_found_among_others() {
        let text = "22 1 0:20 / / rw,noatime shared:1 - overlay overlay rw\n\
            30 22 254:32 / /with\\040space\\134 rw,relatime - ext4 /dev/vdc rw\n\
            31 22 254:3 / /other rw - ext4 /dev/vdb rw\n\
            32 22 254:32 /sub /bound ro,relatime shared:4 master:2 - ext4 /dev/vdc rw\n\
            33 22 0:40 / /layered rw - overlay /dev/vdc rw,lowerdir=/a\n\
            broken";

        let all: Vec<_> = parse(text).collect();

        let of = |number, device: &str| {
            let found = all.iter().filter(|mount| mount.is_of(number, Path::new(device)));
            found.map(|mount| (mount.path.as_str(), mount.read_only)).collect::<Vec<_>>()
        };
        let expected = [("/with space\\", false), ("/bound", true), ("/layered", false)];
        assert_eq!(of("254:32", "/dev/vdc"), expected);
        assert_eq!(of("254:3", "/dev/vdb"), [("/other", false)]);
        assert_eq!(of("9:9", "/dev/vdz"), []);
    }

    /// A service of systemd has a namespace of its own, in which mounts go with those outside.
    #[test]
    fn a_mount_goes_with_the_one_that_it_follows() {
        let mount = |line: &str| Mount::parse(line).unwrap();
        let ours = mount("30 22 254:32 / /data rw shared:7 - ext4 /dev/vdc rw");
        let alone = mount("30 22 254:32 / /data rw - ext4 /dev/vdc rw");

        for (other, goes) in [
            ("90 80 254:32 / /data rw master:7 - ext4 /dev/vdc rw", true),
            ("90 80 254:32 / /data rw shared:9 master:7 - ext4 /dev/vdc rw", true),
            ("90 80 254:32 / /data rw shared:7 - ext4 /dev/vdc rw", true),
            ("90 80 254:32 / /data rw master:9 - ext4 /dev/vdc rw", false),
            ("90 80 254:32 / /inside rw master:7 - ext4 /dev/vdc rw", false),
            ("90 80 254:32 / /data rw - ext4 /dev/vdc rw", false),
        ] {
            assert_eq!(mount(other).follows(&ours), goes, "{other}");
            assert!(!mount(other).follows(&alone), "{other}");
        }
    }

    #[test]
    fn what_this_process_sees_is_read() {
        assert!(ours().unwrap().iter().any(|mount| mount.path == "/"));
        assert!(others().is_ok());
    }
}
