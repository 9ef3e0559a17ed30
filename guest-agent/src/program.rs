//! The program to run: what the configuration says, in the form in which `execve` wants it, and
//! what a refused `execve` means.
//!
//! No shell is involved. The first word is looked up as `execvp` does it: a word with a slash is a
//! path, any other is tried in each directory of the *workload's* PATH.

use std::ffi::{CString, NulError, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ovum_agent_proto::config::INIT_SYSTEMS;
use rustix::io::Errno;

/// PATH of a workload that was given none.
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// HOME of a workload that was given none: workloads run as root.
const HOME_DEFAULT: &str = "/root";

/// A program with its arguments and environment.
#[derive(Debug)]
pub(crate) struct Program {
    name: String,
    candidates: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
}

/// There can be no such program.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramError {
    #[error("There is no program in argv")]
    Empty,
    #[error("There is a NUL in argv or env")]
    Nul(#[source] NulError),
}

/// Why a program did not start: what a shell would have said and exited with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) code: u8,
    pub(crate) message: String,
}

/// The search through the candidates, as the answers of `execve` come in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Search {
    /// The answer that says most about why nothing ran.
    answer: Option<Errno>,
}

impl Program {
    /// The program of these arguments, its name first.
    pub(crate) fn new(argv: &[String], env: &[(String, String)]) -> Result<Self, ProgramError> {
        let name = argv.first().ok_or(ProgramError::Empty)?;
        let env = environment(env);
        let path = env.iter().find_map(|(name, value)| (name == "PATH").then_some(value.as_str()));
        let candidates = candidates(name, path.unwrap_or(PATH_DEFAULT));
        let env = env.iter().map(|(name, value)| format!("{name}={value}"));
        Ok(Self {
            name: name.clone(),
            candidates: strings(candidates.into_iter())?,
            argv: strings(argv.iter().cloned())?,
            env: strings(env)?,
        })
    }

    /// The program as it was asked for: a name or a path.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether this has to be PID 1.
    pub(crate) fn is_init_system(&self) -> bool {
        INIT_SYSTEMS.contains(&self.name.as_str())
    }

    /// Paths to try, in order. Relative ones count from the working directory.
    pub(crate) fn candidates(&self) -> &[CString] {
        &self.candidates
    }

    /// Arguments, the program's name first.
    pub(crate) fn argv(&self) -> &[CString] {
        &self.argv
    }

    /// Environment, each as `NAME=value`.
    pub(crate) fn env(&self) -> &[CString] {
        &self.env
    }

    /// What to say and exit with after a search that found nothing to run.
    pub(crate) fn refusal(&self, search: Search) -> Refusal {
        let name = &self.name;
        let (code, why) = match search.answer.unwrap_or(Errno::NOENT) {
            Errno::NOENT | Errno::NOTDIR => {
                let there = |path: &CString| Path::new(OsStr::from_bytes(path.as_bytes())).exists();
                if self.candidates.iter().any(there) {
                    (127, "its interpreter or loader is not in the image".to_owned())
                } else {
                    (127, "not found".to_owned())
                }
            }
            Errno::ACCESS => (126, "permission denied".to_owned()),
            Errno::NOEXEC => (126, "no format that the kernel can execute".to_owned()),
            errno => (126, errno.to_string()),
        };
        Refusal { code, message: format!("{name}: {why}") }
    }
}

impl Search {
    /// A search that could not begin.
    pub(crate) fn ended(errno: Errno) -> Self {
        Self { answer: Some(errno) }
    }

    /// Notes how one candidate was refused; returns whether to try the next.
    ///
    /// Goes on where `execvp` does: a file that is missing or may not be executed hides nothing
    /// further down the PATH. Of those answers "permission denied" is the one to report.
    pub(crate) fn refused(&mut self, errno: Errno) -> bool {
        let goes_on = matches!(errno, Errno::NOENT | Errno::NOTDIR | Errno::ACCESS);
        if !goes_on || self.answer != Some(Errno::ACCESS) {
            self.answer = Some(errno);
        }
        goes_on
    }
}

/// The environment `under`, with `over` in place of what has the same name.
pub(crate) fn overlaid(
    mut under: Vec<(String, String)>,
    over: &[(String, String)],
) -> Vec<(String, String)> {
    under.retain(|(name, _)| !over.iter().any(|(other, _)| other == name));
    under.extend_from_slice(over);
    under
}

/// The environment as given, with what every program counts on.
fn environment(given: &[(String, String)]) -> Vec<(String, String)> {
    let mut env = given.to_vec();
    for (name, value) in [("PATH", PATH_DEFAULT), ("HOME", HOME_DEFAULT)] {
        if !env.iter().any(|(given, _)| given == name) {
            env.push((name.to_owned(), value.to_owned()));
        }
    }
    env
}

/// Paths under which `name` could be, in the order of `path`. An empty part of `path` means the
/// working directory, as it always has.
fn candidates(name: &str, path: &str) -> Vec<String> {
    if name.contains('/') || name.is_empty() {
        return vec![name.to_owned()];
    }
    path.split(':')
        .map(|directory| if directory.is_empty() { "." } else { directory })
        .map(|directory| format!("{directory}/{name}"))
        .collect()
}

fn strings(texts: impl Iterator<Item = String>) -> Result<Vec<CString>, ProgramError> {
    texts.map(|text| CString::new(text).map_err(ProgramError::Nul)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(argv: &[&str], env: &[(&str, &str)]) -> Result<Program, ProgramError> {
        let argv: Vec<_> = argv.iter().map(ToString::to_string).collect();
        let env: Vec<_> =
            env.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Program::new(&argv, &env)
    }

    fn texts(strings: &[CString]) -> Vec<&str> {
        strings.iter().map(|string| string.to_str().unwrap()).collect()
    }

    #[test]
    fn a_name_is_looked_up_in_the_path_of_the_workload() {
        let program = program(&["run", "-v"], &[("PATH", "/a:/b/c::rel")]).unwrap();

        assert_eq!(texts(program.candidates()), ["/a/run", "/b/c/run", "./run", "rel/run"]);
        assert_eq!(texts(program.argv()), ["run", "-v"]);
    }

    #[test]
    fn a_word_with_a_slash_is_a_path_whatever_the_path_says() {
        for word in ["/bin/run", "./run", "bin/run"] {
            let program = program(&[word], &[("PATH", "/a:/b")]).unwrap();

            assert_eq!(texts(program.candidates()), [word]);
        }
    }

    #[test]
    fn path_and_home_are_there_and_what_was_given_stays_as_it_is() {
        let bare = program(&["run"], &[]).unwrap();
        let full = [("HOME", "/srv"), ("B", "=x=\n y"), ("PATH", ""), ("A", "")];
        let full = program(&["run"], &full).unwrap();

        assert_eq!(texts(bare.env()), [&format!("PATH={PATH_DEFAULT}"), "HOME=/root"]);
        assert_eq!(bare.candidates().len(), 6);
        assert_eq!(texts(full.env()), ["HOME=/srv", "B==x=\n y", "PATH=", "A="]);
        assert_eq!(texts(full.candidates()), ["./run"]);
    }

    #[test]
    fn what_no_kernel_could_run_is_refused_early() {
        let of = program;

        assert!(matches!(of(&[], &[]), Err(ProgramError::Empty)));
        assert!(matches!(of(&["run", "a\0b"], &[]), Err(ProgramError::Nul(_))));
        assert!(matches!(of(&["run"], &[("A", "\0")]), Err(ProgramError::Nul(_))));
    }

    #[test]
    fn only_the_three_init_systems_become_pid_1() {
        let is = |name| program(&[name], &[]).unwrap().is_init_system();

        assert!(INIT_SYSTEMS.into_iter().all(is));
        assert!(!["/bin/sh", "init", "/init", "systemd"].into_iter().any(is));
    }

    /// The code and the words after each possible answer to the candidates in turn.
    #[test]
    fn a_refusal_says_what_a_shell_would() {
        let refusal = |answers: &[Errno]| {
            let program = program(&["run"], &[("PATH", "/nowhere")]).unwrap();
            let mut search = Search::default();
            for (index, &answer) in answers.iter().enumerate() {
                assert_eq!(search.refused(answer), index + 1 < answers.len(), "{answers:?}");
            }
            let Refusal { code, message } = program.refusal(search);
            (code, message)
        };
        use Errno as E;

        let missing = (127, "run: not found".to_owned());
        let denied = (126, "run: permission denied".to_owned());
        let foreign = (126, "run: no format that the kernel can execute".to_owned());
        assert_eq!(refusal(&[]), missing);
        assert_eq!(refusal(&[E::NOENT, E::ACCESS, E::NOENT, E::NOEXEC]), foreign);
        assert_eq!(refusal(&[E::NOENT, E::NOTDIR, E::NOEXEC]), foreign);
        let (code, message) = refusal(&[E::NOENT, E::TOOBIG]);
        assert_eq!((code, message.contains("too long")), (126, true), "{message}");

        let mut search = Search::default();
        assert!([E::NOENT, E::ACCESS, E::NOENT].into_iter().all(|answer| search.refused(answer)));
        let program = program(&["run"], &[]).unwrap();
        let Refusal { code, message } = program.refusal(search);
        assert_eq!((code, message), denied);
    }

    #[test]
    fn a_file_that_is_there_and_still_not_found_lacks_its_interpreter() {
        let program = program(&["/proc/self/exe"], &[]).unwrap();

        let Refusal { code, message } = program.refusal(Search::ended(Errno::NOENT));

        assert_eq!(code, 127);
        assert_eq!(message, "/proc/self/exe: its interpreter or loader is not in the image");
    }
}
