//! `/instances/{id}/cp`: files into an instance and out of it, over a WebSocket.
//!
//! ```text
//! to     client  TEXT request   BINARY bytes   TEXT {"type":"end"}
//!        server                                                      TEXT result
//! from   client  TEXT request
//!        server  TEXT header   BINARY bytes   TEXT {"type":"end","final":false}   ...
//! ```
//!
//! Upwards one connection carries one file or directory, downwards a whole tree. Clients give up on
//! any text of type `error`, so none is sent that could be lived with.
//!
//! Not in the original: `link_target` in a request makes a symbolic link, `mtime` sets the time.

use axum::response::Response;
use serde::{Deserialize, Serialize};

use crate::api::error::ErrorBody;
use crate::api::socket::{self, Gone, Input, Sink, Source, Visit};
use crate::causes::chain;
use crate::instances::inside::Inside;
use crate::instances::inside::agent::AgentError;
use crate::instances::inside::agent::copy::{GetEvent, Put};
use crate::instances::inside::agent::files::{Entry, EntryKind, GetSpec, PutKind, PutSpec};

/// Permission bits of a file and of a directory whose request says none.
const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;

/// All permission bits there are, and those that clients take.
const MODE_MAX: u32 = 0o7777;
const MODE_SHOWN: u32 = 0o777;

/// What a client asks for. Whatever else it says is ignored.
#[derive(Debug, Deserialize)]
struct CopyRequest {
    direction: Direction,
    guest_path: String,
    #[serde(default)]
    is_dir: bool,
    #[serde(default)]
    mode: u32,
    #[serde(default)]
    follow_links: bool,
    uid: Option<u32>,
    gid: Option<u32>,
    link_target: Option<String>,
    mtime: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    To,
    From,
}

/// What a client says after its bytes.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Control {
    End,
}

/// What is said to a client beside bytes.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum View {
    Header(HeaderView),
    End {
        #[serde(rename = "final")]
        is_final: bool,
    },
    Result {
        success: bool,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
        #[serde(skip_serializing_if = "is_zero")]
        bytes_written: u64,
    },
    Error {
        message: String,
    },
}

#[derive(Debug, Serialize)]
struct HeaderView {
    path: String,
    mode: u32,
    is_dir: bool,
    #[serde(skip_serializing_if = "is_false")]
    is_symlink: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    link_target: Option<String>,
    size: u64,
    mtime: u64,
    uid: u32,
    gid: u32,
}

/// What a copy is.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    To(PutSpec),
    From(GetSpec),
}

/// Copies into a running instance or out of it, over a WebSocket.
#[utoipa::path(
    get, path = "/instances/{id}/cp", tag = "instances",
    params(("id" = String, Path, description = "Id, name, or the beginning of an id")),
    responses((status = 101), (status = "default", body = ErrorBody)),
)]
pub(super) async fn cp(visit: Visit) -> Response {
    visit.begin(serve)
}

pub(super) async fn serve(inside: Inside, mut sink: Sink, mut source: Source) {
    let served = match source.request::<CopyRequest>().await.and_then(CopyRequest::checked) {
        Ok(Asked::To(spec)) => take(&inside, spec, &mut sink, &mut source).await,
        Ok(Asked::From(spec)) => tokio::select! {
            served = give(&inside, spec, &mut sink) => served,
            () = source.gone() => Err(Gone),
        },
        Err(message) => socket::send_json(&mut sink, &View::Error { message }).await,
    };
    if let Ok(()) = served {
        source.close(sink, "").await;
    }
}

/// Takes one entry of the client into the guest.
///
/// A client that is refused is told at once, but some listen only once they have said all.
async fn take(
    inside: &Inside,
    spec: PutSpec,
    sink: &mut Sink,
    source: &mut Source,
) -> Result<(), Gone> {
    let stored = match inside.put(spec).await {
        Ok(put) => store(put, source).await?,
        Err(error) => Err(Refused::early(chain(&error))),
    };
    match stored {
        Ok(bytes_written) => {
            let result = View::Result { success: true, error: None, bytes_written };
            socket::send_json(sink, &result).await
        }
        Err(Refused { why, heard_all }) => {
            let result = View::Result { success: false, error: Some(why), bytes_written: 0 };
            socket::send_json(sink, &result).await?;
            if !heard_all {
                source.skip_bytes().await;
            }
            Ok(())
        }
    }
}

/// An entry that was not stored.
#[derive(Debug)]
struct Refused {
    /// For people.
    why: String,
    /// The client has sent all of it.
    heard_all: bool,
}

impl Refused {
    fn early(why: String) -> Self {
        Self { why, heard_all: false }
    }
}

/// Passes the bytes of a file on; returns how many there are, or what went wrong.
async fn store(mut put: Put, source: &mut Source) -> Result<Result<u64, Refused>, Gone> {
    loop {
        // A client that pauses learns of the guest's end, too.
        let input = tokio::select! {
            biased;
            error = put.refused() => return Ok(Err(Refused::early(chain(&error)))),
            input = source.next() => input?,
        };
        match input {
            Input::Binary(bytes) => {
                if let Err(error) = put.send(&bytes).await {
                    return Ok(Err(Refused::early(chain(&error))));
                }
            }
            Input::Text(text) => {
                let stored = match serde_json::from_str(&text) {
                    Ok(Control::End) => put.finish().await.map_err(|error| chain(&error)),
                    Err(error) => Err(format!("invalid message: {error}")),
                };
                return Ok(stored.map_err(|why| Refused { why, heard_all: true }));
            }
        }
    }
}

/// Gives a tree of the guest to the client.
async fn give(inside: &Inside, spec: GetSpec, sink: &mut Sink) -> Result<(), Gone> {
    let mut get = match inside.get(spec).await {
        Ok(get) => get,
        Err(error) => return fail(&error, sink).await,
    };
    let mut is_first = true;
    loop {
        match get.next().await {
            Ok(GetEvent::Entry(entry)) => {
                // Only now it is known that the one before was not the last.
                if !is_first {
                    socket::send_json(sink, &View::End { is_final: false }).await?;
                }
                is_first = false;
                socket::send_json(sink, &View::Header(entry.into())).await?;
            }
            Ok(GetEvent::Data(bytes)) => socket::send_bytes(sink, bytes).await?,
            Ok(GetEvent::End) => {
                return socket::send_json(sink, &View::End { is_final: true }).await;
            }
            Err(error) => return fail(&error, sink).await,
        }
    }
}

async fn fail(error: &AgentError, sink: &mut Sink) -> Result<(), Gone> {
    socket::send_json(sink, &View::Error { message: chain(error) }).await
}

impl CopyRequest {
    fn checked(self) -> Result<Asked, String> {
        let Self { direction, guest_path: path, is_dir, mode, follow_links, .. } = self;
        if path.is_empty() {
            return Err("guest_path is empty".to_owned());
        }
        if direction == Direction::From {
            return Ok(Asked::From(GetSpec { path, follow_links }));
        }
        if mode > MODE_MAX {
            return Err(format!("mode is {mode}: at most {MODE_MAX} (octal 7777) is possible"));
        }
        let (kind, mode_default) = match (self.link_target, is_dir) {
            (Some(_), true) => return Err("link_target and is_dir exclude each other".to_owned()),
            (Some(target), false) => (PutKind::Link(target), FILE_MODE),
            (None, true) => (PutKind::Directory, DIRECTORY_MODE),
            (None, false) => (PutKind::File, FILE_MODE),
        };
        let mode = if mode == 0 { mode_default } else { mode };
        let (owner, mtime) = (self.uid.zip(self.gid), self.mtime);
        Ok(Asked::To(PutSpec { path, kind, mode, owner, mtime }))
    }
}

impl From<Entry> for HeaderView {
    fn from(entry: Entry) -> Self {
        let Entry { path, kind, mode, size, mtime, uid, gid } = entry;
        let (is_dir, link_target) = match kind {
            EntryKind::File => (false, None),
            EntryKind::Directory => (true, None),
            EntryKind::Link(target) => (false, Some(target)),
        };
        Self {
            path,
            mode: mode & MODE_SHOWN,
            is_dir,
            is_symlink: link_target.is_some(),
            link_target,
            size,
            // Clients know no time before 1970.
            mtime: u64::try_from(mtime).unwrap_or(0),
            uid,
            gid,
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_false(flag: &bool) -> bool {
    !flag
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(json: &str) -> Result<Asked, String> {
        serde_json::from_str::<CopyRequest>(json).map_err(|e| e.to_string())?.checked()
    }

    fn put(json: &str) -> PutSpec {
        match asked(json) {
            Ok(Asked::To(spec)) => spec,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_mode_of_zero_means_the_usual_one() {
        let file = put(r#"{"direction":"to","guest_path":"/a","is_dir":false,"mode":0}"#);
        let directory = put(r#"{"direction":"to","guest_path":"/a","is_dir":true}"#);
        let own = put(r#"{"direction":"to","guest_path":"/a","mode":2541}"#);

        assert_eq!((file.kind, file.mode), (PutKind::File, 0o644));
        assert_eq!((directory.kind, directory.mode), (PutKind::Directory, 0o755));
        assert_eq!(own.mode, 0o4755);
    }

    #[test]
    fn an_owner_is_set_if_both_halves_were_sent() {
        let owner =
            |rest: &str| put(&format!(r#"{{"direction":"to","guest_path":"/a"{rest}}}"#)).owner;

        assert_eq!(owner(r#","uid":0,"gid":0"#), Some((0, 0)));
        assert_eq!(owner(r#","uid":5"#), None);
        assert_eq!(owner(""), None);
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_words() {
        for json in [
            "{}",
            r#"{"direction":"up","guest_path":"/a"}"#,
            r#"{"direction":"to"}"#,
            r#"{"direction":"to","guest_path":""}"#,
            r#"{"direction":"to","guest_path":"/a","mode":4096}"#,
            r#"{"direction":"to","guest_path":"/a","mode":-1}"#,
            r#"{"direction":"to","guest_path":"/a","uid":-1}"#,
            r#"{"direction":"to","guest_path":"/a","is_dir":true,"link_target":"b"}"#,
        ] {
            assert!(asked(json).is_err(), "{json}");
        }
    }

    #[test]
    fn the_wire_is_this() {
        let json = |view: &View| serde_json::to_string(view).unwrap();
        let entry = Entry {
            path: "d/l".into(),
            kind: EntryKind::Link("x".into()),
            mode: 0o4777,
            size: 0,
            mtime: -5,
            uid: 1,
            gid: 2,
        };

        assert_eq!(
            json(&View::Header(entry.into())),
            r#"{"type":"header","path":"d/l","mode":511,"is_dir":false,"is_symlink":true,"#
                .to_owned()
                + r#""link_target":"x","size":0,"mtime":0,"uid":1,"gid":2}"#
        );
        assert_eq!(json(&View::End { is_final: true }), r#"{"type":"end","final":true}"#);
        let result = |success, error, bytes_written| View::Result { success, error, bytes_written };
        assert_eq!(json(&result(true, None, 0)), r#"{"type":"result","success":true}"#);
        assert_eq!(
            json(&result(true, None, 7)),
            r#"{"type":"result","success":true,"bytes_written":7}"#
        );
        assert_eq!(
            json(&result(false, Some("no".into()), 0)),
            r#"{"type":"result","success":false,"error":"no"}"#
        );
        assert!(matches!(serde_json::from_str(r#"{"type":"end"}"#), Ok(Control::End)));
    }
}
