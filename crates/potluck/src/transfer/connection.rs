//! Owns a connection's thread: it waits for the socket and for commands at once, keeps every
//! deadline, and never waits for anything else but the engine's queue and the disk.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Weak};

use potluck_core::id::PeerId;
use potluck_core::time::{Duration, Moment};
use potluck_core::wire::stream::Frame;
use rustix::event::{PollFd, PollFlags, poll};

use super::gather::Gather;
use super::limiter::Turn;
use super::secure::{Arrived, Secure};
use super::session::{GetHandle, Session, last_words};
use super::unsent::Unsent;
use super::{Command, ConnId, Connection, Context, Gone, Handle, Letter, Mailbox, no_tls};
use crate::door::{Pass, timespec};
use crate::timing::{self, Work};
use crate::{clock, tls};

/// Where a read in the midst of a piece brings less than this, more is let gather: on a slow link
/// every packet would wake us.
const LITTLE: usize = 16 << 10;
/// So long it gathers at the most: what comes behind the piece waits as well.
const GATHERING: Duration = Duration::from_millis(10);
/// For less it is not worth it.
const LEAST_GATHERING: Duration = Duration::from_millis(1);
/// To connect.
const CONNECT: Duration = Duration::from_secs(5);
/// From the connected socket to a believed Hello.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// A machine in the middle of a frame, or that owes us pieces, says something within this.
const PROGRESS: Duration = Duration::from_secs(15);
/// A machine takes something of what it is sent within this, …
const TAKE: Duration = Duration::from_secs(30);
/// … or within this, if it says meanwhile that it is there: where it keeps to a low limit of its own,
/// there is room in our socket again only after megabytes.
const SLOW_TAKE: Duration = Duration::from_secs(300);
/// So often at the most we tell that a machine of which we fetch is there: it said something.
const ALIVE: Duration = Duration::from_secs(1);
/// After so long without a word we show that we are alive.
const PING: Duration = Duration::from_secs(15);
/// The same where the other side waits for pieces: longer queues must not look like death.
const PING_WAITING: Duration = Duration::from_secs(5);
/// After so long without a word from the other side it is dead.
const SILENCE: Duration = Duration::from_secs(45);
/// How often the other's certificate is looked at again: it expires, and a connection that came up
/// while the list of removed machines changed was told of the change by nobody.
const MEMBERSHIP: Duration = Duration::from_secs(20);
/// How long a goodbye may take.
const GOODBYE: Duration = Duration::from_secs(1);
/// How often the deadlines are looked at.
const TICK: Duration = Duration::from_secs(1);
/// When the kernel asks whether a silent machine is still there, for what our own pings miss.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// The life of a connection that we dial.
pub(super) fn dialled(
    ctx: &Arc<Context>,
    conn: ConnId,
    to: SocketAddr,
    expect: PeerId,
    mailbox: &Arc<Mailbox>,
    owner: &Weak<Handle>,
) {
    let owner = owner.clone();
    let handle: GetHandle = Box::new(move || owner.upgrade().map(Connection));
    let mut session = Session::new(ctx, conn, to, true, Arc::clone(mailbox), handle);
    match connect(ctx, to, expect) {
        Ok(secure) => Thread::new(secure, session, mailbox, None).run(),
        Err(gone) => session.report_gone(&gone),
    }
}

fn connect(ctx: &Context, to: SocketAddr, expect: PeerId) -> Result<Secure, Gone> {
    let unreachable = |error: std::io::Error| Gone::Unreachable(error.to_string());
    let socket = TcpStream::connect_timeout(&to, CONNECT).map_err(unreachable)?;
    prepare(&socket).map_err(unreachable)?;
    tls::client(&ctx.key, tls::Expect::Key(expect.0), tls::PEERS)
        .and_then(|config| Secure::dialled(Arc::new(socket), config))
        .map_err(|error| Gone::Insecure(no_tls(&error).message))
}

/// The life of a connection that calls here.
pub(super) fn accepted(ctx: &Arc<Context>, socket: Arc<TcpStream>, from: SocketAddr, pass: Pass) {
    let secure = prepare(&socket).map_err(|e| e.to_string()).and_then(|()| {
        Secure::accepted(socket, Arc::clone(&ctx.callers)).map_err(|e| e.to_string())
    });
    let (secure, (mailbox, connection)) = match (secure, Connection::new()) {
        (Ok(secure), Ok(made)) => (secure, made),
        (Err(error), _) => return tracing::debug!(%error, "a caller could not be served"),
        (_, Err(error)) => return tracing::warn!(%error, "a caller could not be served"),
    };
    let conn = ctx.number();
    let handle: GetHandle = Box::new(move || Some(connection));
    let session = Session::new(ctx, conn, from, false, Arc::clone(&mailbox), handle);
    Thread::new(secure, session, &mailbox, Some(pass)).run();
}

fn prepare(socket: &TcpStream) -> std::io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new().with_time(KEEPALIVE);
    socket2::SockRef::from(socket).set_tcp_keepalive(&keepalive)
}

struct Thread {
    secure: Secure,
    gather: Gather,
    session: Session,
    mailbox: Arc<Mailbox>,
    letters: VecDeque<Letter>,
    pass: Option<Pass>,
    began: Moment,
    /// The last byte from the other side.
    heard: Moment,
    /// The last byte taken by the kernel, or the last time nothing was there to be taken.
    taken: Moment,
    /// The last byte that we said.
    said: Moment,
    checked: Moment,
    /// When we last told that the other side is alive.
    alive: Moment,
    is_up: bool,
    /// Up to where in the stream we say what is large: small frames beyond wait for no turn.
    large_until: u64,
    /// The last read, where it left us in the midst of a piece.
    amid: Option<Moment>,
    unsent: Unsent,
    /// More gathers in the socket until then.
    gathers: Option<Moment>,
    /// Whose turn it is to send and to receive, where that is limited.
    up: Turn,
    down: Turn,
}

/// What the socket is ready for.
#[derive(Clone, Copy, Default)]
struct Ready {
    read: bool,
    write: bool,
}

impl Thread {
    fn new(secure: Secure, session: Session, mailbox: &Arc<Mailbox>, pass: Option<Pass>) -> Self {
        let now = clock::now();
        let (up, down) = session.turns();
        Self {
            unsent: Unsent::new(secure.socket(), now),
            secure,
            gather: Gather::new(),
            session,
            mailbox: Arc::clone(mailbox),
            letters: VecDeque::new(),
            pass,
            began: now,
            heard: now,
            taken: now,
            said: now,
            checked: now,
            alive: now,
            is_up: false,
            large_until: 0,
            amid: None,
            gathers: None,
            up,
            down,
        }
    }

    /// Lives until the connection is over, and has said so.
    fn run(mut self) {
        let Err(gone) = self.live();
        if gone == Gone::Ended {
            // Who ended it may be about to end the process: first what is to be said to the other.
            self.say_goodbye(&gone);
            self.session.report_gone(&gone);
        } else {
            self.session.report_gone(&gone);
            self.say_goodbye(&gone);
        }
    }

    fn live(&mut self) -> Result<Infallible, Gone> {
        timing::begin();
        self.open()?; // the dialler's first flight
        loop {
            self.read_mail()?;
            self.speak()?;
            self.session.hand_over()?;
            let ready = self.wait()?;
            let now = clock::now();
            if ready.read {
                self.hear()?;
            }
            self.keep_time(now, ready)?;
        }
    }

    fn read_mail(&mut self) -> Result<(), Gone> {
        if self.letters.is_empty() {
            self.mailbox.take(&mut self.letters);
        } else {
            let mut more = VecDeque::new();
            self.mailbox.take(&mut more);
            self.letters.append(&mut more);
        }
        let ends = |letter: &Letter| {
            matches!(letter, Letter::Abandoned | Letter::Command(Command::Bye(..)))
        };
        if !self.is_up {
            return if self.letters.iter().any(ends) { Err(Gone::Ended) } else { Ok(()) };
        }
        while let Some(letter) = self.letters.pop_front() {
            match letter {
                Letter::Command(command) => self.session.on_command(command)?,
                Letter::Abandoned => return Err(Gone::Ended),
            }
        }
        Ok(())
    }

    /// Seals and writes what is to be said, until there is nothing, the kernel takes no more, or the
    /// limit allows no more.
    fn speak(&mut self) -> Result<(), Gone> {
        loop {
            if self.secure.is_flushed() {
                self.taken = clock::now();
                if !self.secure.is_handshaking() {
                    self.seal()?;
                }
                if self.secure.is_flushed() {
                    return Ok(());
                }
            }
            // Small frames wait for no turn.
            let waits = self.secure.written() < self.large_until;
            let room = if waits { self.up.room() } else { usize::MAX };
            let took = self.secure.write(room)?;
            timing::lap(Work::Send);
            if took > 0 {
                self.up.moved(took);
                self.taken = clock::now();
                self.unsent.took(self.secure.socket(), self.taken, took);
                self.said = self.taken;
                self.session.on_written(self.secure.written())?;
            }
            if !self.secure.is_flushed() && took < room {
                return Ok(());
            }
            if room == 0 {
                self.taken = clock::now(); // it is we who wait
                return Ok(());
            }
        }
    }

    /// Fills the outgoing buffer. No piece is read before it is its turn.
    fn seal(&mut self) -> Result<(), Gone> {
        loop {
            let outbox = &mut self.session.outbox;
            let (said, large) = (outbox.plain().len(), outbox.is_large());
            if said == 0 && !outbox.has_serves() {
                if self.secure.is_flushed() {
                    self.up.rest();
                }
                return Ok(());
            }
            if (said == 0 || large) && self.up.room() == 0 {
                return Ok(());
            }
            timing::lap(Work::Other);
            let before = self.secure.sealed();
            if said > 0 {
                let n = self.secure.seal(self.session.outbox.plain())?;
                timing::lap(Work::Seal);
                self.session.outbox.said(n);
                if n < said {
                    return Ok(());
                }
            } else if !self.session.serve(&mut self.secure)? {
                return Ok(());
            }
            if (said == 0 || large) && self.secure.sealed() > before {
                self.large_until = self.secure.sealed();
            }
        }
    }

    /// Waits for the socket, a letter, a turn, or the next look at the clock.
    fn wait(&mut self) -> Result<Ready, Gone> {
        // While it is not our turn to receive, what lies in the socket stays there: TCP holds the
        // other side back.
        let (held, to_send) = (self.down.until().max(self.gathers.take()), self.up.until());
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::IN, held.is_none());
        interest.set(PollFlags::OUT, !self.secure.is_flushed() && to_send.is_none());
        let turn = [held, to_send].into_iter().flatten().min();
        let tick = turn.map_or(TICK, |turn| turn.since(clock::now()).min(TICK));
        // Before the connection is up, letters lie until it is: only new ones wake us.
        let timeout = if self.mailbox.fall_asleep() { tick } else { Duration::ZERO };
        let mut fds = [
            PollFd::new(&self.mailbox.bell, PollFlags::IN),
            PollFd::new(self.secure.socket(), interest),
        ];
        // A socket of which nothing is wanted would still wake us when the other side hangs up.
        let watched = if interest.is_empty() { 1 } else { 2 };
        let waits_for = self.waits_for();
        timing::lap(Work::Other);
        let polled = poll(&mut fds[..watched], Some(&timespec(timeout)));
        timing::laps(waits_for);
        let (rang, socket) = (!fds[0].revents().is_empty(), fds[1].revents());
        self.mailbox.wake_up(rang);
        match polled {
            Ok(_) => Ok(Ready {
                // Errors and hang-ups show when reading.
                read: held.is_some()
                    || socket.intersects(PollFlags::IN | PollFlags::ERR | PollFlags::HUP),
                write: socket.contains(PollFlags::OUT),
            }),
            Err(rustix::io::Errno::INTR) => Ok(Ready::default()),
            Err(error) => Err(Gone::Lost(error.to_string())),
        }
    }

    /// What a wait is for; nothing while it is idle.
    fn waits_for(&self) -> &'static [Work] {
        let to_send = !self.secure.is_flushed() || self.up.until().is_some() || self.session.owes();
        match (to_send, self.session.awaits()) {
            (true, true) => &[Work::ToSend, Work::ToReceive],
            (true, false) => &[Work::ToSend],
            (false, true) => &[Work::ToReceive],
            (false, false) => &[],
        }
    }

    /// Reads once, if it is our turn, and does what it says.
    fn hear(&mut self) -> Result<(), Gone> {
        // Before it is up, what the other side says is little and waits for no turn.
        let room = if self.is_up { self.down.room() } else { usize::MAX };
        if room == 0 {
            return Ok(());
        }
        let wanted = self.gather.piece().map(|len| len - self.secure.opened().len().min(len));
        let arrived = self.secure.read(room, wanted)?;
        timing::lap(Work::Receive);
        let n = match arrived {
            Arrived::Some(n) => {
                self.heard = clock::now();
                self.down.moved(n);
                if n < room {
                    self.down.rest();
                }
                n
            }
            Arrived::Nothing => {
                self.down.rest();
                return Ok(());
            }
            Arrived::End => return Err(self.hung_up()),
        };
        self.open()?;
        timing::lap(Work::Open);
        self.let_gather(n);
        if self.session.is_up() && !self.is_up {
            self.is_up = true;
            self.secure.grow();
            if let Some(pass) = self.pass.take() {
                pass.let_in();
            }
        }
        self.tell_alive(self.heard)?;
        self.session.hand_over()
    }

    /// After a read of `n` bytes: lets more gather where it was little and the piece is not over.
    fn let_gather(&mut self, n: usize) {
        let missing = self.gather.piece().map(|len| len.saturating_sub(self.secure.opened().len()));
        let before = std::mem::replace(&mut self.amid, missing.map(|_| self.heard));
        if let (Some(before), Some(missing)) = (before, missing) {
            let wait = time_to_gather(n, self.heard.since(before), missing);
            self.gathers = wait.map(|wait| self.heard + wait);
        }
    }

    /// Tells that the other side said something, if that was not told just now.
    fn tell_alive(&mut self, now: Moment) -> Result<(), Gone> {
        if now.since(self.alive) >= ALIVE && self.session.fetches() {
            self.alive = now;
            self.session.report_alive(self.gather.is_amid())?;
        }
        Ok(())
    }

    /// Opens what was read and does what it says, as far as it could be opened.
    fn open(&mut self) -> Result<(), Gone> {
        let was_handshaking = self.secure.is_handshaking();
        let opened = self.secure.open();
        if was_handshaking && !self.secure.is_handshaking() && opened.is_ok() {
            let key = self.secure.peer_key();
            let key = key.ok_or_else(|| Gone::Insecure("it speaks another protocol".to_owned()))?;
            self.session.on_secure(PeerId(key))?;
        }
        self.gather.take(self.secure.opened(), &mut self.session)?;
        opened
    }

    fn hung_up(&self) -> Gone {
        Gone::Lost(
            match (self.is_up, self.secure.is_handshaking()) {
                (true, _) => "it hung up",
                (false, true) => "it hung up before it showed who it is",
                (false, false) => "it hung up without a word: it may not hold us for a member",
            }
            .to_owned(),
        )
    }

    /// Looks at every deadline, as of `now`, when the socket was `ready` for no more than this: our
    /// own waits for the disk or the engine are nobody's silence.
    fn keep_time(&mut self, now: Moment, ready: Ready) -> Result<(), Gone> {
        if !self.is_up {
            return match now.since(self.began) {
                time if time < HANDSHAKE => Ok(()),
                _ => Err(Gone::TimedOut("it did not show who it is")),
            };
        }
        let silent = now.since(self.heard);
        if !ready.read && silent >= PROGRESS {
            if self.gather.is_amid() {
                return Err(Gone::TimedOut("it stopped in the middle of a frame"));
            }
            if self.session.owed_for(now) >= PROGRESS {
                return Err(Gone::TimedOut("it owes pieces and says nothing"));
            }
            if silent >= SILENCE {
                return Err(Gone::TimedOut("it is silent"));
            }
            self.gather.rest();
            self.session.outbox.rest();
            self.secure.rest();
        }
        let patience = if silent >= TAKE { TAKE } else { SLOW_TAKE };
        if !ready.write && !self.secure.is_flushed() && now.since(self.taken) >= patience {
            return Err(Gone::TimedOut("it takes nothing of what it is sent"));
        }
        let quiet = now.since(self.said);
        if quiet >= PING || (quiet >= PING_WAITING && self.session.owes()) {
            self.said = now;
            self.session.outbox.say(&Frame::Ping)?;
        }
        if now.since(self.checked) >= MEMBERSHIP {
            self.checked = now;
            self.session.recheck()?;
        }
        Ok(())
    }

    /// Says why it is over, to those who may know, and sees to it that it arrives.
    fn say_goodbye(&mut self, gone: &Gone) {
        let said = self.session.goodbye.take().or_else(|| last_words(gone));
        let Some((why, text)) = said.filter(|_| self.session.may_speak()) else { return };
        self.session.outbox.end_with(&Frame::Bye(why, &text));
        let is_flushed = self.secure.is_flushed();
        if !is_flushed && matches!(gone, Gone::NotMember(_) | Gone::NotJoined) {
            return; // not another byte of it
        }
        let deadline = clock::now() + GOODBYE;
        while clock::now() < deadline && self.speak().is_ok() && !self.secure.is_flushed() {
            self.wait_until(PollFlags::OUT, deadline);
        }
        // Closing a socket with unread bytes would take the goodbye back: read until the other side
        // has hung up as well.
        let _ = self.secure.socket().shutdown(Shutdown::Write);
        let mut waste = vec![0; 64 << 10];
        while clock::now() < deadline {
            match std::io::Read::read(&mut self.secure.socket(), &mut waste) {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    self.wait_until(PollFlags::IN, deadline);
                }
                Err(_) => return,
            }
        }
    }

    fn wait_until(&self, flags: PollFlags, deadline: Moment) {
        let mut fds = [PollFd::new(self.secure.socket(), flags)];
        let _ = poll(&mut fds, Some(&timespec(deadline.since(clock::now()))));
    }
}

/// How long to let bytes gather, when `n` of a piece came since `took` ago and so many are missing:
/// until enough or the rest has come at that rate.
fn time_to_gather(n: usize, took: Duration, missing: usize) -> Option<Duration> {
    let due = missing.min(LITTLE) as u32;
    let wait = (took.saturating_mul(due) / n.max(1) as u32).min(GATHERING);
    (n < LITTLE && wait >= LEAST_GATHERING).then_some(wait)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::Event;
    use crate::transfer::incoming::opened;
    use crate::transfer::puppet::{Machine, Puppet, key};
    use potluck_core::id::{ContentId, Piece};
    use potluck_core::limit::Limit;
    use potluck_core::wire::stream::{Channel, Side};
    use std::net::TcpListener;

    const OURS: Channel = Channel { number: 1, opener: Side::Us };

    /// A thread that is not running, connected to a puppet, and up; and its machine.
    fn paused() -> (Thread, Puppet, Machine, Connection) {
        let machine = Machine::new(2);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let puppet = std::thread::spawn(move || Puppet::answer(&listener, 3));
        let secure = connect(&machine.ctx, address, key(3).peer()).unwrap();
        let (mailbox, connection) = Connection::new().unwrap();
        let first = connection.clone();
        let session = Session::new(
            &machine.ctx,
            ConnId(0),
            address,
            true,
            Arc::clone(&mailbox),
            Box::new(move || Some(first)),
        );
        let mut thread = Thread::new(secure, session, &mailbox, None);
        thread.open().unwrap();
        while !thread.is_up {
            thread.turn();
        }
        assert!(matches!(machine.event(), Event::Up { .. }));
        thread.alive = thread.began + Duration::from_secs(3_600); // says nothing of its own accord
        (thread, puppet.join().unwrap(), machine, connection)
    }

    impl Thread {
        fn turn(&mut self) {
            self.read_mail().unwrap();
            self.speak().unwrap();
            if self.wait().unwrap().read {
                self.hear().unwrap();
            }
        }

        /// Waits no longer than for a letter.
        fn wait_with_letter(&mut self, connection: &Connection) -> Ready {
            connection.tell(Command::Recheck);
            self.wait().unwrap()
        }

        fn after(&mut self, seconds: u64) -> Result<(), Gone> {
            self.keep_time(self.heard + Duration::from_secs(seconds), Ready::default())
        }
    }

    #[test]
    fn who_is_silent_is_dropped_after_a_while_and_sooner_in_the_middle_of_a_frame() {
        let (mut thread, mut puppet, _machine, _kept) = paused();
        assert_eq!(thread.after(44), Ok(()));
        assert_eq!(thread.after(46), Err(Gone::TimedOut("it is silent")));
        puppet.say_bytes(&[0, 0, 0]);
        while !thread.gather.is_amid() {
            thread.turn();
        }
        assert_eq!(thread.after(14), Ok(()));
        let late = thread.heard + Duration::from_secs(16);
        // What lies in the socket unread is no silence.
        assert_eq!(thread.keep_time(late, Ready { read: true, write: false }), Ok(()));
        assert!(matches!(thread.after(16), Err(Gone::TimedOut(_))));
    }

    #[test]
    fn what_comes_in_small_parts_is_let_gather_until_enough_or_the_rest_of_the_piece_is_due() {
        let ms = Duration::from_millis;
        let a_packet = 1_448;
        // 0.5 MB/s: as long as is allowed; 5 MB/s: until 16 KiB are there; 50 MB/s: not at all.
        assert_eq!(time_to_gather(a_packet, ms(3), 60_000), Some(GATHERING));
        let wait = time_to_gather(a_packet, Duration::from_micros(290), 60_000).unwrap();
        assert!((ms(3)..ms(4)).contains(&wait), "{wait:?}");
        assert_eq!(time_to_gather(a_packet, Duration::from_micros(29), 60_000), None);
        // The end of the piece is not waited past.
        assert_eq!(time_to_gather(a_packet, ms(3), a_packet), Some(ms(3)));
        assert_eq!(time_to_gather(a_packet, ms(3), 400), None);
        assert_eq!(time_to_gather(LITTLE, ms(3), 60_000), None);
        assert_eq!(time_to_gather(0, ms(3), 60_000), Some(GATHERING));
    }

    #[test]
    fn who_owes_metadata_and_says_nothing_is_dropped() {
        let (mut thread, mut puppet, machine, connection) = paused();
        connection.tell(Command::Open { channel: 1, id: ContentId::file([1; 32]) });
        thread.turn();
        let theirs = OURS.flipped();
        puppet.hear(|frame| assert!(matches!(frame, Frame::Open(channel, _) if channel == theirs)));
        puppet.say(&Frame::Opened { channel: theirs, size: 9, manifest: 0, proof: 7 });
        puppet.say(&Frame::Busy(theirs, vec![Piece(3)], 1)); // never asked for: of no account
        while machine.knows_of_nothing() {
            thread.turn();
        }
        assert_eq!(thread.after(16), Ok(()));
        connection.tell(Command::WantMeta { channel: 1 });
        thread.turn();
        let late = clock::now() + Duration::from_secs(16);
        assert!(matches!(thread.keep_time(late, Ready::default()), Err(Gone::TimedOut(_))));
        puppet.say(&Frame::Meta(theirs, b"1234"));
        puppet.say(&Frame::Meta(theirs, b"567"));
        assert!(matches!(machine.event(), Event::Opened { channel: 1, size: 9, .. }));
        while machine.knows_of_nothing() {
            thread.turn();
        }
        let Event::Meta { channel: 1, manifest, proof } = machine.event() else { panic!("Meta") };
        assert_eq!((&manifest[..], &proof[..]), (&b""[..], &b"1234567"[..]));
        let late = clock::now() + Duration::from_secs(16);
        assert_eq!(thread.keep_time(late, Ready::default()), Ok(()));
    }

    #[test]
    fn a_host_that_says_anything_is_told_to_be_alive_and_whether_a_piece_is_coming() {
        let (mut thread, mut puppet, machine, connection) = paused();
        let mut later = thread.alive + Duration::from_secs(1);
        thread.tell_alive(later).unwrap(); // nothing is fetched: of no account
        connection.tell(Command::Open { channel: 1, id: ContentId::file([1; 32]) });
        thread.turn();
        let theirs = OURS.flipped();
        puppet.hear(|frame| assert!(matches!(frame, Frame::Open(channel, _) if channel == theirs)));
        puppet.say(&Frame::Opened { channel: theirs, size: 9, manifest: 0, proof: 7 });
        while machine.knows_of_nothing() {
            thread.turn();
        }
        assert!(matches!(machine.any_event(), Event::Opened { .. }));
        for coming in [false, true] {
            thread.tell_alive(later).unwrap();
            thread.tell_alive(later + Duration::from_millis(999)).unwrap();
            thread.session.hand_over().unwrap();
            assert!(matches!(machine.any_event(), Event::Alive { coming: it } if it == coming));
            assert!(machine.knows_of_nothing(), "once a second");
            later = later + Duration::from_secs(1);
            puppet.say_bytes(&[0, 0]);
            while !thread.gather.is_amid() {
                thread.turn();
            }
        }
    }

    #[test]
    fn an_idle_connection_shows_that_it_is_alive() {
        let (mut thread, puppet, _machine, connection) = paused();
        let later = thread.said + Duration::from_secs(16);
        thread.heard = later;
        assert_eq!(thread.keep_time(later, Ready::default()), Ok(()));
        connection.tell(Command::Bye(potluck_core::wire::stream::Goodbye::Done, String::new()));
        thread.speak().unwrap();
        drop(thread);
        let all = puppet.hear_all();
        let mut ping = vec![];
        Frame::Ping.encode(&mut ping);
        assert_eq!(all, ping);
    }

    #[test]
    fn a_caller_that_does_not_show_who_it_is_has_five_seconds() {
        let (mut thread, _puppet, _machine, _kept) = paused();
        thread.is_up = false;
        assert_eq!(
            thread.keep_time(thread.began + Duration::from_secs(4), Ready::default()),
            Ok(())
        );
        let late = thread.began + Duration::from_secs(5);
        assert!(matches!(thread.keep_time(late, Ready::default()), Err(Gone::TimedOut(_))));
    }

    #[test]
    fn who_takes_nothing_is_dropped() {
        let (mut thread, _puppet, _machine, _kept) = paused();
        while thread.secure.is_flushed() {
            let big = potluck_core::bitfield::Bitfield::all(4 << 20);
            thread.session.outbox.say(&Frame::Have(OURS, big)).unwrap();
            thread.speak().unwrap();
        }
        let late = |seconds| thread.taken + Duration::from_secs(seconds);
        let (soon, late, too_late) = (late(29), late(31), late(301));
        let blocked = Ready { read: false, write: false };
        thread.heard = thread.taken;
        let room = Ready { read: true, write: true };
        assert_eq!(thread.keep_time(late, room), Ok(()));
        let not_a_word = Ready { read: true, write: false };
        assert_eq!(thread.keep_time(soon, not_a_word), Ok(()));
        assert!(matches!(thread.keep_time(late, not_a_word), Err(Gone::TimedOut(_))));
        // Who says meanwhile that it is there may keep to a limit of its own.
        thread.heard = late;
        assert_eq!(thread.keep_time(late, blocked), Ok(()));
        thread.heard = too_late;
        assert!(matches!(thread.keep_time(too_late, blocked), Err(Gone::TimedOut(_))));
    }

    /// Puts a limit on a direction for which a turn lasts seconds, and takes that turn.
    fn no_turn_for_long(machine: &Machine, up: bool) {
        let limit = Limit::new(16_000).unwrap();
        let (mine, off) = (limit, Limit::OFF);
        let (a, b) = if up { (mine, off) } else { (off, mine) };
        machine.ctx.set_limits(a, b);
        let limiter = if up { &machine.ctx.up } else { &machine.ctx.down };
        let mut other = Turn::new(Arc::clone(limiter));
        assert!(other.room() > 0);
        other.moved(10_000_000);
    }

    #[test]
    fn who_may_not_receive_yet_leaves_what_there_is_and_takes_nobody_for_silent() {
        let (mut thread, mut puppet, machine, connection) = paused();
        no_turn_for_long(&machine, false);
        puppet.say(&Frame::Open(OURS, ContentId::file([1; 32])));
        let ready = loop {
            let ready = thread.wait().unwrap();
            if ready.read {
                break ready;
            }
        };
        thread.hear().unwrap();
        assert!(machine.knows_of_nothing());
        assert!(thread.down.until().is_some());
        thread.gather.take(&mut opened(&[0, 0]), &mut thread.session).unwrap();
        let late = thread.heard + Duration::from_secs(50);
        assert!(ready.read && thread.keep_time(late, ready).is_ok());
        let ready = thread.wait_with_letter(&connection);
        assert!(ready.read && thread.keep_time(late, ready).is_ok(), "held back by ourselves");
    }

    #[test]
    fn who_may_not_send_yet_reads_no_piece_but_says_small_things_and_a_new_limit_wakes_it() {
        let (mut thread, mut puppet, machine, connection) = paused();
        no_turn_for_long(&machine, true);
        thread.session.outbox.serve(7, Piece(1));
        thread.session.outbox.say(&Frame::Ping).unwrap();
        connection.tell(Command::Open { channel: 1, id: ContentId::file([1; 32]) });
        thread.read_mail().unwrap();
        thread.speak().unwrap();
        puppet.hear(|frame| assert!(matches!(frame, Frame::Open(..))));
        assert!(thread.up.until().is_some() && thread.session.outbox.has_serves());
        machine.ctx.set_limits(Limit::OFF, Limit::OFF);
        connection.tell(Command::Relimit);
        thread.wait().unwrap();
        thread.read_mail().unwrap();
        thread.speak().unwrap();
        assert!(!thread.session.outbox.has_serves());
    }

    #[test]
    fn a_member_that_is_one_no_longer_is_noticed_without_being_told() {
        let (mut thread, _puppet, machine, _kept) = paused();
        machine.identify(|identity| identity.revoked = [key(3).peer()].into());
        let later = thread.checked + Duration::from_secs(20);
        thread.heard = later;
        let over = thread.keep_time(later, Ready::default());
        assert!(matches!(over, Err(Gone::NotMember(_))));
    }
}
