//! `ovum cp`: files and folders into an instance and out of it, by the rules of `docker cp`.
//!
//! What a path that ends in `/.` names is the content of a folder. A folder that goes where a
//! folder is goes into it, under its own name; one that goes where nothing is becomes that. Links
//! are copied as links unless they shall be followed. A `-` is a tar archive on standard input or
//! output.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, bail};
use clap::Args;

use super::{ServerArgs, output};
use crate::api::stat::StatView;
use crate::client::{Client, segment};

mod download;
mod pack;
mod put;
mod tree;
mod unpack;
mod upload;

/// Bytes of a file sent at a time.
const CHUNK_BYTES: usize = 32 << 10;

/// What can be typed after `ovum cp`.
#[derive(Debug, Args)]
pub(super) struct CpArgs {
    /// Owner and group are kept
    #[arg(short, long)]
    archive: bool,
    /// Links are copied as what they lead to
    #[arg(short = 'L', long)]
    follow_links: bool,
    /// Says nothing
    #[arg(short, long)]
    quiet: bool,
    /// What: a path here, INSTANCE:PATH, or - for a tar archive on standard input
    source: String,
    /// Where to: INSTANCE:PATH, a path here, or - for a tar archive on standard output
    destination: String,
    #[command(flatten)]
    server: ServerArgs,
}

/// How a copy is made.
#[derive(Debug, Clone, Copy)]
struct Ways {
    archive: bool,
    follow_links: bool,
}

/// An instance that is copied into, or out of.
#[derive(Debug)]
struct Guest {
    client: Client,
    /// Where its routes begin.
    route: String,
}

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side<'a> {
    Here(&'a str),
    /// An archive, on standard input or output.
    Stream,
    There {
        instance: &'a str,
        path: &'a str,
    },
}

/// What was moved.
#[derive(Debug, Clone, Copy, Default)]
struct Moved {
    entries: u64,
    bytes: u64,
}

/// What is known of the place where a copy shall go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Nothing,
    File,
    Directory,
}

/// Copies.
pub(super) async fn cp(args: CpArgs) -> anyhow::Result<()> {
    let ways = Ways { archive: args.archive, follow_links: args.follow_links };
    let moved = match (Side::of(&args.source), Side::of(&args.destination)) {
        (Side::Here(from), Side::There { instance, path }) => {
            let guest = Guest::of(&args.server, instance)?;
            upload::upload(&guest, Path::new(from), path, ways).await?
        }
        (Side::There { instance, path }, Side::Here(to)) => {
            let guest = Guest::of(&args.server, instance)?;
            download::download(&guest, path, Path::new(to), ways).await?
        }
        (Side::Stream, Side::There { instance, path }) => {
            let guest = Guest::of(&args.server, instance)?;
            unpack::unpack(&guest, path, ways).await?
        }
        (Side::There { instance, path }, Side::Stream) => {
            let guest = Guest::of(&args.server, instance)?;
            pack::pack(&guest, path, ways).await?
        }
        (Side::Here(_) | Side::Stream, Side::Here(_) | Side::Stream) => {
            bail!("One of the two must be INSTANCE:PATH")
        }
        (Side::There { .. }, Side::There { .. }) => {
            bail!("Only one of the two may be INSTANCE:PATH")
        }
    };
    if !args.quiet {
        let Moved { entries, bytes } = moved;
        output::note(&format!("Copied {entries} files and folders, {bytes} bytes"));
    }
    Ok(())
}

impl<'a> Side<'a> {
    /// A path here may have a colon, too, if it begins with a dot or a slash.
    fn of(text: &'a str) -> Self {
        match text.split_once(':') {
            None if text == "-" => Self::Stream,
            Some((instance, path))
                if !instance.is_empty()
                    && !instance.contains('/')
                    && !instance.starts_with('.') =>
            {
                let path = if path.is_empty() { "/" } else { path };
                Self::There { instance, path }
            }
            _ => Self::Here(text),
        }
    }
}

impl Guest {
    fn of(server: &ServerArgs, instance: &str) -> anyhow::Result<Self> {
        let route = format!("/instances/{}", segment(instance));
        Ok(Self { client: server.client()?, route })
    }

    /// What lies at a path, behind links.
    async fn stat(&self, path: &str) -> anyhow::Result<Place> {
        let path = format!("{}/stat?path={}&follow_links=true", self.route, segment(path));
        let view: StatView = self.client.get(&path).await?;
        if let Some(error) = view.error {
            bail!("{error}");
        }
        Ok(match view {
            StatView { is_dir: true, .. } => Place::Directory,
            StatView { exists: true, .. } => Place::File,
            StatView { .. } => Place::Nothing,
        })
    }
}

impl Place {
    /// What lies at a path here, behind links.
    fn here(path: &Path) -> anyhow::Result<Self> {
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => Ok(Self::Directory),
            Ok(_) => Ok(Self::File),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::Nothing),
            Err(error) => Err(error).with_context(|| format!("Failed to look at {path:?}")),
        }
    }

    /// Where `name` goes if it shall go to `path`, which is this. A `path` that ends in a slash is
    /// a folder; `is_content` is what a source that ends in `/.` asks for.
    fn target(
        self,
        path: &str,
        name: &str,
        is_dir: bool,
        is_content: bool,
    ) -> anyhow::Result<String> {
        let wants_folder = path.ends_with('/') || path.ends_with("/.");
        match self {
            Self::Directory if is_dir && is_content => Ok(path.to_owned()),
            Self::Directory => Ok(format!("{}/{name}", path.trim_end_matches('/'))),
            Self::File if is_dir || wants_folder => bail!("{path} is not a folder"),
            Self::Nothing if wants_folder && !is_dir => bail!("There is no folder {path}"),
            Self::File | Self::Nothing => Ok(path.to_owned()),
        }
    }
}

/// Whether the content of a folder is meant, and not the folder.
fn is_content(path: &str) -> bool {
    path == "." || path.ends_with("/.")
}

/// The name under which a path's end goes elsewhere.
fn base_name(path: &Path) -> anyhow::Result<String> {
    let whole = match path.file_name() {
        Some(_) => path.to_owned(),
        None => fs::canonicalize(path).with_context(|| format!("Failed to find {path:?}"))?,
    };
    let name = whole.file_name().map_or("root".into(), |name| name.to_string_lossy());
    Ok(name.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_tells_an_instance_from_a_path_here() {
        let there = |instance, path| Side::There { instance, path };

        assert_eq!(Side::of("web:/etc/hosts"), there("web", "/etc/hosts"));
        assert_eq!(Side::of("web:"), there("web", "/"));
        assert_eq!((Side::of("-"), Side::of("./-")), (Side::Stream, Side::Here("./-")));
        assert_eq!(Side::of("web:a:b"), there("web", "a:b"));
        for here in ["file", "./a:b", "/a:b", "a/b:c", ":x", "."] {
            assert_eq!(Side::of(here), Side::Here(here));
        }
    }

    /// The table of docker's manual: what is at the destination, and what that makes of it.
    #[test]
    fn where_things_go_is_this_table() {
        let target = |place: Place, path: &str, is_dir, is_content| {
            place.target(path, "src", is_dir, is_content).ok()
        };
        let at = |text: &str| Some(text.to_owned());
        use Place::{Directory, File, Nothing};

        assert_eq!(target(Nothing, "/a/b", false, false), at("/a/b"));
        assert_eq!(target(Nothing, "/a/b/", false, false), None);
        assert_eq!(target(File, "/a/b", false, false), at("/a/b"));
        assert_eq!(target(File, "/a/b/", false, false), None);
        assert_eq!(target(Directory, "/a/b", false, false), at("/a/b/src"));
        assert_eq!(target(Directory, "/", false, false), at("/src"));
        assert_eq!(target(Nothing, "/a/b", true, false), at("/a/b"));
        assert_eq!(target(Nothing, "/a/b/", true, true), at("/a/b/"));
        assert_eq!(target(File, "/a/b", true, false), None);
        assert_eq!(target(Directory, "/a/b/", true, false), at("/a/b/src"));
        assert_eq!(target(Directory, "/a/b", true, true), at("/a/b"));
    }
}
