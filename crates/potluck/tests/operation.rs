//! What who runs an index relies on: that it says how it is, goes on where its disk does not, takes new
//! settings while it runs, and ends without leaving anybody without an answer.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::{Child, ChildStdin, Stdio};
use std::time::Duration;

use common::{Machine, Under, can_run, made_up, potluck, until, with_small_disk};
use potluck::control::Event;
use potluck::{Invitation, testing};
use potluck_core::id::{ContentId, RequestId};
use potluck_core::seal::{ReplyHead, RequestHead, open, seal_request};
use potluck_core::trust::MachineKey;
use potluck_core::wire::datagram::{
    Ack, Code, HELD_ALL, Item, Load, MAX_DATAGRAM, Register, Reply, Request,
};
use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(60);

/// Where an index's metrics are read.
fn metrics_of(index: &Machine) -> SocketAddr {
    match &index.ready {
        Event::Ready { metrics: Some(at), .. } => at.parse().unwrap(),
        other => panic!("{other:?}"),
    }
}

fn get(at: SocketAddr, path: &str) -> String {
    let mut socket = TcpStream::connect(at).unwrap();
    socket.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    answer
}

/// A member that speaks datagrams, without a peer around it.
struct Member {
    socket: UdpSocket,
    session: potluck_core::wire::desk::Session,
    counter: u64,
    cookie: [u8; 16],
}

impl Member {
    fn joins(invitation: &str, seed: u8) -> Self {
        let invitation: Invitation = invitation.parse().unwrap();
        let (session, at) =
            testing::session(&MachineKey::from_seed([seed; 32]), &invitation).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(at).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut member = Self { socket, session, counter: 0, cookie: [0; 16] };
        member.sends(&hosts(0));
        match member.hears() {
            Reply::Error(refusal) if refusal.code == Code::CookieNeeded => {
                member.cookie = refusal.cookie.unwrap();
            }
            other => panic!("{other:?}"),
        }
        member
    }

    fn sends(&mut self, request: &Request) {
        self.counter += 1;
        let head = RequestHead {
            kind: request.kind(),
            epoch: self.session.epoch,
            member: self.session.member,
            salt: self.session.salt,
            counter: self.counter,
            cookie: self.cookie,
        };
        let plaintext = request.encode(RequestId(self.counter));
        self.socket.send(&seal_request(&self.session.keys.to_index, &head, &plaintext)).unwrap();
    }

    fn hears(&self) -> Reply {
        let mut buffer = [0; MAX_DATAGRAM + 1];
        let len = self.socket.recv(&mut buffer).expect("the index answers");
        let head = ReplyHead::decode(&buffer[..len]).unwrap();
        let key = self.session.keys.reply_key(head.boot);
        let plaintext = open(&key, head.counter, &mut buffer[..len]).expect("it opens");
        Reply::decode(head.kind, plaintext).unwrap().1
    }
}

/// A registration of one content.
fn hosts(n: u32) -> Request {
    let id = ContentId::file(*blake3::hash(&n.to_be_bytes()).as_bytes());
    Request::Register(Register {
        port: 7_000,
        load: Load { free_slots: 1, ..Load::default() },
        digest: [0; 16],
        round: 0,
        round_ends: false,
        items: vec![Item { id, size: 1, held: HELD_ALL, name: None }],
    })
}

/// An index with its stderr to be read.
struct Spoken {
    child: Child,
    /// It ends when this does; waiting for the child would close it, were it there.
    _leash: Option<ChildStdin>,
    stderr: BufReader<std::process::ChildStderr>,
    invitation: String,
}

impl Spoken {
    fn start(state: &std::path::Path, more: &[&str]) -> Self {
        let mut child = potluck(state)
            .args(["index", "--json", "--leash", "--listen", "127.0.0.1:0"])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let Ok(Event::Ready { invite: Some(invitation), .. }) = Event::from_line(&line) else {
            panic!("{line}");
        };
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { _leash: child.stdin.take(), child, stderr, invitation }
    }

    fn is_told(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for a line of the log.
    fn logs(&mut self, what: &str) {
        let mut line = String::new();
        while self.stderr.read_line(&mut line).unwrap() > 0 {
            if line.contains(what) {
                return;
            }
            line.clear();
        }
        panic!("it never said {what:?}");
    }
}

impl Drop for Spoken {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_index_tells_machines_how_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let index = Machine::start_with(dir.path(), "index", "index", &["--metrics", "127.0.0.1:0"]);
    let at = metrics_of(&index);
    let mut member = Member::joins(&index.invitation(), 1);
    member.sends(&hosts(1));
    assert!(matches!(member.hears(), Reply::Ack(Ack::Registered(_))));
    member.socket.send(&[0; 200]).unwrap(); // nobody's
    let metrics = until("what was done is counted", || {
        let metrics = get(at, "/metrics");
        metrics.contains("dropped_total{reason=\"Malformed\"} 1\n").then_some(metrics)
    });
    for line in [
        "requests_total{pdu=\"R\",code=\"CookieNeeded\"} 1",
        "requests_total{pdu=\"R\",code=\"done\"} 1",
        "members 1",
        "contents 1",
        "registrations 1",
        "sessions 1",
        "journal_healthy 1",
    ] {
        assert!(metrics.contains(&format!("\npotluck_index_{line}\n")), "{line} in {metrics}");
    }
    assert!(get(at, "/readyz").ends_with("\r\n\r\nready\n"));
    assert!(get(at, "/healthz").ends_with("\r\n\r\nserving\n"));
}

#[test]
fn an_index_that_is_told_to_end_answers_what_has_come_writes_it_down_and_ends_well() {
    const MANY: u32 = 100; // they, and their answers, fit any socket
    let dir = tempfile::tempdir().unwrap();
    let mut index = Spoken::start(&dir.path().join("state"), &["--workers", "1"]);
    let mut member = Member::joins(&index.invitation, 1);
    // What comes while it stands still waits in its socket.
    index.is_told(Signal::STOP);
    (1..=MANY).for_each(|n| member.sends(&hosts(n)));
    index.is_told(Signal::TERM);
    index.is_told(Signal::CONT);
    for _ in 0..MANY {
        assert!(matches!(member.hears(), Reply::Ack(Ack::Registered(_))));
    }
    assert_eq!(index.child.wait().unwrap().code(), Some(0));

    let again = Machine::start_by(
        dir.path().to_owned(),
        "index",
        "index",
        &["--metrics", "127.0.0.1:0"],
        Under::default(),
    );
    let metrics = get(metrics_of(&again), "/metrics");
    assert!(metrics.contains(&format!("\npotluck_index_registrations {MANY}\n")), "{metrics}");
}

#[test]
fn settings_are_read_again_at_sighup_and_a_bad_file_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("index.toml");
    fs::write(&config, "members = 1\nlog = \"info\"\n").unwrap();
    let mut index =
        Spoken::start(&dir.path().join("state"), &["--config", config.to_str().unwrap()]);
    let invitation: Invitation = index.invitation.parse().unwrap();
    let join = |seed| testing::session(&MachineKey::from_seed([seed; 32]), &invitation);
    join(1).unwrap();
    let full = join(2).expect_err("it is refused");
    assert!(full.message.contains("as many members as it may"), "{full}");
    fs::write(&config, "members = 2").unwrap();
    index.is_told(Signal::HUP);
    index.logs("settings were read again");
    join(2).unwrap();
    fs::write(&config, "members = 20\nmembres = 30").unwrap();
    index.is_told(Signal::HUP);
    index.logs("line 2: there is no setting membres");
    let full = join(3).expect_err("it is refused");
    assert!(full.message.contains("as many members as it may"), "{full}");

    // One that is wrong from the start is no start.
    let output = potluck(&dir.path().join("other"))
        .args(["index", "--listen", "127.0.0.1:0", "--config", config.to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn an_index_whose_disk_is_full_serves_from_memory_says_so_and_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("index");
    let state = home.join("state");
    fs::create_dir_all(&state).unwrap();
    let process = with_small_disk(8, &state);
    if !can_run(&process) {
        println!("SKIPPED: no tmpfs can be mounted in a namespace of its own here");
        return;
    }
    let by = Under { process, verbs: vec![] };
    let index = Machine::start_by(home, "index", "index", &["--metrics", "127.0.0.1:0"], by);
    let at = metrics_of(&index);
    let alice = Machine::start(dir.path(), "alice", "up");
    alice.joins(&index.invitation());

    // Nothing more fits: not a byte.
    let seen = std::path::PathBuf::from(format!("/proc/{}/root{}", index.pid(), state.display()));
    let filler = seen.join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    while file.write(&[0; 4_096]).is_ok_and(|written| written > 0) {}
    drop(file);
    // It is used until the disk has to give room.
    let mut n = 0;
    until("the index notices", || {
        n += 1;
        alice.shares(&format!("film-{n}"), &made_up(1_000 + n));
        get(at, "/readyz").contains("ready, but from memory only").then_some(())
    });
    assert!(get(at, "/metrics").contains("\npotluck_index_journal_healthy 0\n"));
    let stranger: Invitation = index.invitation().parse().unwrap();
    let refused =
        testing::session(&MachineKey::from_seed([1; 32]), &stranger).expect_err("it is refused");
    assert!(refused.message.contains("cannot write its state"), "{refused}");
    alice.shares("song", &made_up(50_000));
    assert!(alice.lists().iter().any(|row| row.name.as_deref() == Some("song")));

    fs::remove_file(&filler).unwrap();
    until("it recovers by itself", || {
        get(at, "/readyz").ends_with("\r\n\r\nready\n").then_some(())
    });
    assert!(get(at, "/metrics").contains("\npotluck_index_journal_healthy 1\n"));
    testing::session(&MachineKey::from_seed([1; 32]), &stranger).unwrap();
    // What was in memory only is on disk: the file alone has it.
    let copied = dir.path().join("copy");
    fs::create_dir_all(copied.join("state/index")).unwrap();
    for name in ["key", "index.redb"] {
        fs::copy(seen.join("index").join(name), copied.join("state/index").join(name)).unwrap();
    }
    drop((index, alice));
    let more = ["--metrics", "127.0.0.1:0"];
    let again = Machine::start_by(copied, "copy", "index", &more, Under::default());
    let metrics = get(metrics_of(&again), "/metrics");
    let registrations = format!("\npotluck_index_registrations {}\n", n + 1);
    assert!(metrics.contains(&registrations), "{registrations} in {metrics}");
}
