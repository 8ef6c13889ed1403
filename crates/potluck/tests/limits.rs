//! How fast a machine sends and receives, as its owner sets it, and what is told of transfers.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod common;

use common::{Machine, Table, made_up, table};
use potluck::control::{Event, Request, Stats, Status};

/// More than the lowest limit lets through in as long as any test may take.
const MUCH: usize = 4 << 20;

fn limits(event: &Event) -> (Option<u64>, Option<u64>) {
    match event {
        Event::Limits { up, down } => (*up, *down),
        other => panic!("{other:?}"),
    }
}

fn status(machine: &Machine) -> Status {
    match machine.asks(&Request::Status).pop() {
        Some(Event::Status(status)) => *status,
        other => panic!("{other:?}"),
    }
}

fn shown(machine: &Machine) -> (Option<u64>, Option<u64>) {
    let status = status(machine);
    (status.limit_up, status.limit_down)
}

/// Fetches under a limit that `slow` keeps to, which is lifted on the way.
fn fetch_until_lifted(net: &Table<2>, slow: &Machine, option: &str) -> Stats {
    let [alice, bob] = &net.peers;
    slow.does(&["limit", option, "16kB"]);
    let id = alice.shares("film", &made_up(MUCH));
    let mut fetch = bob.begins(&["get", &id, "-o", "copy"]);
    fetch.says_so(|event| matches!(event, Event::Progress { done, .. } if *done > 0));
    assert!(bob.has(&id) < MUCH as u64);
    slow.does(&["limit", option, "off"]);
    match fetch.ends() {
        (0, Event::Done { path, stats: Some(stats), .. }) => {
            assert!(std::fs::read(path).unwrap() == made_up(MUCH));
            *stats
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_limit_holds_until_it_is_lifted_and_then_the_rest_comes_at_once() {
    let net = table(["alice", "bob"]);
    let stats = fetch_until_lifted(&net, &net.peers[0], "--up");
    assert_eq!(stats.fetched.bytes, MUCH as u64);
    assert_eq!((stats.fetched.bad, stats.fetched.failed), (0, 0));
    assert!(stats.seconds.hash > 0.0 && stats.seconds.wait_to_receive > 0.0, "{stats:?}");
    let [alice, _] = &net.peers;
    let served = status(alice).stats;
    assert_eq!(served.served.bytes, MUCH as u64);
    assert!(served.seconds.seal > 0.0 && served.seconds.wait_to_send > 0.0, "{served:?}");
}

#[test]
fn a_limit_of_what_is_received_holds_the_other_side_back() {
    let net = table(["alice", "bob"]);
    let stats = fetch_until_lifted(&net, &net.peers[1], "--down");
    assert_eq!(stats.fetched.bytes, MUCH as u64);
}

#[test]
fn limits_are_shown_and_those_set_by_limit_are_remembered() {
    let Table { index: _index, peers: [mut alice, bob], dir: _dir } = table(["alice", "bob"]);
    assert_eq!(limits(&alice.does(&["limit"])), (None, None));
    let set = alice.does(&["limit", "--up", "1Mbit", "--down", "20MB"]);
    assert_eq!(limits(&set), (Some(125_000), Some(20_000_000)));
    assert_eq!(limits(&alice.does(&["limit", "--down", "off"])), (Some(125_000), None));
    // What another verb asks for holds for this run.
    let id = bob.shares("film", b"short");
    alice.gets_with(&[&id, "--limit-down", "5MiB"]);
    assert_eq!(shown(&alice), (Some(125_000), Some(5 << 20)));
    alice.is_killed();
    alice.is_back();
    assert_eq!(shown(&alice), (Some(125_000), None));
}

#[test]
fn limits_given_at_the_start_go_before_what_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::start_with(dir.path(), "alice", "up", &["--limit-up", "1MB"]);
    assert_eq!(shown(&machine), (Some(1_000_000), None));
    machine.does(&["limit", "--up", "2MB", "--down", "3MB"]);
    assert_eq!(shown(&machine), (Some(2_000_000), Some(3_000_000)));
    machine.is_killed();
    machine.is_back();
    assert_eq!(shown(&machine), (Some(1_000_000), Some(3_000_000)));
    let too_low = machine.asks(&Request::Limit { up: Some(1), down: None, keep: true });
    assert_eq!(too_low[0].failure().unwrap().exit_code(), 2);
}
