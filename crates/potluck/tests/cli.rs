//! The command line where no peer is needed: help, usage errors, and what is said when nothing runs.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::path::Path;
use std::process::{Command, Stdio};

use assert_cmd::assert::OutputAssertExt;

const VERBS: [&str; 19] = [
    "share",
    "get",
    "ls",
    "find",
    "watch",
    "unshare",
    "status",
    "peers",
    "limit",
    "verify",
    "join",
    "leave",
    "invite",
    "members",
    "index",
    "up",
    "down",
    "demo",
    "completions",
];

/// The program with a state folder of its own and no settings of whoever runs the tests.
fn potluck(state: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_potluck"));
    for name in
        ["POTLUCK_LISTEN", "POTLUCK_LABEL", "POTLUCK_LIMIT_UP", "POTLUCK_LIMIT_DOWN", "POTLUCK_LOG"]
    {
        command.env_remove(name);
    }
    command.env("POTLUCK_STATE", state.join("state")).current_dir(state).stdin(Stdio::null());
    command
}

fn stdout(state: &Path, args: &[&str], code: i32) -> String {
    let output = potluck(state).args(args).assert().code(code).get_output().clone();
    String::from_utf8(output.stdout).unwrap()
}

fn stderr(state: &Path, args: &[&str], code: i32) -> String {
    let output = potluck(state).args(args).assert().code(code).get_output().clone();
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn alone_it_says_what_it_is_and_how_to_begin() {
    let dir = tempfile::tempdir().unwrap();
    let text = stdout(dir.path(), &[], 0);
    for needed in ["potluck demo", "potluck share PATH", "potluck get CODE", "potluck help"] {
        assert!(text.contains(needed), "{needed} is missing from:\n{text}");
    }
    assert!(text.lines().count() <= 20, "it is an overview, not a manual:\n{text}");
    assert!(!dir.path().join("state").exists());
}

#[test]
fn the_help_of_every_verb_explains_itself_with_examples_in_80_columns() {
    let dir = tempfile::tempdir().unwrap();
    let root = stdout(dir.path(), &["--help"], 0);
    for verb in VERBS {
        assert!(root.contains(&format!("\n  {verb} ")), "{verb} is not listed in:\n{root}");
        let long = stdout(dir.path(), &["help", verb], 0);
        assert!(long.contains("\nExample"), "{verb} has no example:\n{long}");
        assert!(
            long.contains(&format!("  potluck {verb}")),
            "{verb}'s example is not of it:\n{long}"
        );
        for text in [&long, &stdout(dir.path(), &[verb, "-h"], 0)] {
            let wide = text.lines().find(|line| line.chars().count() > 80);
            assert_eq!(wide, None, "{verb}");
        }
    }
    let rm = stdout(dir.path(), &["members", "rm", "--help"], 0);
    assert!(rm.contains("\nExample"), "{rm}");
}

#[test]
fn every_option_is_documented_with_its_default() {
    let dir = tempfile::tempdir().unwrap();
    for verb in VERBS {
        let text = stdout(dir.path(), &["help", verb], 0);
        let mut options: Vec<(String, String)> = Vec::new();
        for line in text.lines() {
            if line.trim_start().starts_with('-') && line.starts_with("  ") {
                options.push((line.trim().to_owned(), String::new()));
            } else if line.starts_with("          ")
                && let Some((_, doc)) = options.last_mut()
            {
                doc.push_str(line.trim());
                doc.push(' ');
            }
        }
        for (option, doc) in options {
            if option.contains("--help") || option.contains("--verbose") {
                continue;
            }
            assert!(!doc.is_empty(), "{verb} {option} says nothing");
            assert!(doc.contains("[default: "), "{verb} {option} has no default: {doc}");
        }
    }
}

#[test]
fn exit_codes_are_documented() {
    let dir = tempfile::tempdir().unwrap();
    for args in [&["help", "exit-codes"][..], &["exit-codes"]] {
        let text = stdout(dir.path(), args, 0);
        for code in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 130] {
            let documented = text.lines().any(|line| line.trim().starts_with(&format!("{code}  ")));
            assert!(documented, "{code} is missing from:\n{text}");
        }
    }
    assert!(stdout(dir.path(), &["--help"], 0).contains("potluck help exit-codes"));
}

#[test]
fn what_is_not_understood_ends_with_2_before_anything_is_started() {
    let dir = tempfile::tempdir().unwrap();
    let wrong: [&[&str]; 19] = [
        &["dance"],
        &["share"],
        &["get"],
        &["get", "film@0"],
        &["get", "a/b"],
        &["get", "potluck1damaged@host:1"],
        &["get", "film", "--overwrite", "--skip"],
        &["get", "film", "--timeout", "soon"],
        &["get", "film", "--seed", "10m"],
        &["get", "film", "--limit-down", "20Mb"],
        &["limit", "--up", "1k"],
        &["get", "film", "--listen", "somewhere"],
        &["join", "hello"],
        &["join", "-"],
        &["share", ".", "--name", "a/b"],
        &["invite", "--uses", "0"],
        &["invite", "--role", "king"],
        &["status", "-q", "-v"],
        &["completions", "tcl"],
    ];
    for args in wrong {
        assert!(!stderr(dir.path(), args, 2).is_empty(), "{args:?}");
        assert!(!dir.path().join("state").exists(), "{args:?}");
    }
}

#[test]
fn aliases_mean_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for (alias, verb) in [("send", "share"), ("recv", "get"), ("search", "find"), ("rm", "unshare")]
    {
        let text = stdout(dir.path(), &[alias, "--help"], 0);
        assert_eq!(text, stdout(dir.path(), &[verb, "--help"], 0));
    }
}

#[test]
fn where_nothing_runs_it_is_said_and_nothing_is_started() {
    let dir = tempfile::tempdir().unwrap();
    for verb in ["status", "peers", "limit"] {
        let text = stderr(dir.path(), &[verb], 3);
        assert!(text.starts_with("potluck: no peer runs for "), "{text}");
        assert!(text.contains("\n  hint: "), "{text}");
    }
    let text = stderr(dir.path(), &["down"], 0);
    assert!(text.starts_with("nothing runs for "), "{text}");
    assert_eq!(stderr(dir.path(), &["down", "-q", "--index"], 0), "");
    assert!(!dir.path().join("state").exists());
}

#[test]
fn a_machine_that_never_joined_is_told_how_to() {
    let dir = tempfile::tempdir().unwrap();
    let verbs: [&[&str]; 9] = [
        &["ls"],
        &["ls", "--watch"],
        &["watch"],
        &["find", "film"],
        &["unshare", "film"],
        &["verify"],
        &["leave"],
        &["invite"],
        &["members"],
    ];
    for args in verbs {
        let text = stderr(dir.path(), args, 4);
        assert!(text.contains("joined no network") && text.contains("potluck join"), "{text}");
        assert!(!dir.path().join("state").exists(), "{args:?}");
    }
}

#[test]
fn a_failure_is_one_json_object_with_a_version_where_json_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let text = stdout(dir.path(), &["status", "--json"], 3);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with(r#"{"v":1,"event":"failed","code":3,"error":""#), "{text}");
    let text = stdout(dir.path(), &["--json", "down"], 0);
    assert!(text.starts_with(r#"{"v":1,"event":"note","text":"nothing runs"#), "{text}");
}

#[test]
fn what_does_not_exist_cannot_be_shared_and_nothing_is_started_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let text = stderr(dir.path(), &["share", "no\u{1b}[31msuch"], 3);
    assert!(text.starts_with("potluck: cannot share no\\u{1b}[31msuch: "), "{text}");
    assert!(!dir.path().join("state").exists());
}

#[test]
fn without_a_home_the_state_folder_must_be_given() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = potluck(dir.path());
    for name in ["POTLUCK_STATE", "HOME", "XDG_STATE_HOME"] {
        command.env_remove(name);
    }
    let output = command.arg("status").assert().code(2).get_output().clone();
    assert!(String::from_utf8_lossy(&output.stderr).contains("--state"));

    let mut command = potluck(dir.path());
    command.env_remove("POTLUCK_STATE").env("XDG_STATE_HOME", dir.path()).arg("status");
    let output = command.assert().code(3).get_output().clone();
    let wanted = format!("{}/potluck", dir.path().display());
    assert!(String::from_utf8_lossy(&output.stderr).contains(&wanted));
}

#[test]
fn completions_know_the_verbs() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = stdout(dir.path(), &["completions", shell], 0);
        for verb in VERBS {
            assert!(script.contains(verb), "{shell} does not know {verb}");
        }
    }
}

#[test]
fn a_reader_that_goes_away_is_no_reason_to_complain() {
    let dir = tempfile::tempdir().unwrap();
    for args in [&["completions", "bash"][..], &[], &["--help"], &["down", "--json"]] {
        let mut child = potluck(dir.path());
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child = child.args(args).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {} {said}", output.status);
        assert!(!said.contains("panicked") && !said.contains("rror"), "{args:?}: {said}");
    }
}
