//! Owns a peer's line to the index: asks again until answered, keeps leases alive, makes sure that
//! the index knows what this peer hosts. Never opens a socket; what it is told by the index it
//! believes only as far as the seal goes.
//!
//! Registrations heal by themselves: every heartbeat carries a digest of all this peer believes to
//! be registered. Where it differs from the index's, the index says so and everything is registered
//! again in a numbered round, at whose end the index forgets what the round did not name.

use std::collections::{BTreeMap, BTreeSet};

use zeroize::Zeroize;

use crate::dice::Dice;
use crate::fault::{Backoff, Fault};
use crate::id::{ContentId, RequestId};
use crate::seal::{ReplyHead, RequestHead, open, seal_request};
use crate::time::{Duration, Moment};
use crate::wire::datagram::{
    Ack, Code, ITEMS_ROOM, Item, Load, Notice, Refusal, Register, Registered, Reply, Request, Row,
    Watch, Watching, digest_of,
};
use crate::wire::desk::Session;

/// Questions of the owner that wait for an answer.
const MAX_QUESTIONS: usize = 1_024;
/// `R` and `T` datagrams under way at once: enough to fill a long line, too few to flood an index.
const MAX_BATCHES: usize = 4;
/// Times a question is sent before it is given up.
const MAX_TRIES: u32 = 16;
/// Unanswered tries after which new keys are fetched: an index that lost its state is silent.
const TRIES_BEFORE_SESSION: u32 = 6;
/// The first wait for an answer, unless the line is known to be slow.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait between two tries.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// For so long nothing is sent where the index says that it was asked too fast.
const SLOW_DOWN: Duration = Duration::from_secs(1);
/// The longest a question waits in all, with or without keys.
const PATIENCE: Duration = Duration::from_secs(14);
/// A question that got no answer so far fails after this, when fetching keys fails as well.
const KEYLESS_PATIENCE: Duration = Duration::from_secs(3);
/// Fetching keys is tried again after this, at first and at most.
const SESSION_WAITS: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Keys that are said to hold for less are kept for so long: an index may not have them fetched without
/// pause.
const SHORTEST_SESSION: Duration = Duration::from_secs(60);
/// A machine that was removed asks so often whether it is one of the members again.
const REMOVED_WAIT: Duration = Duration::from_secs(60);
/// Cookies that one question is repeated for at once.
const MAX_COOKIES: u32 = 3;
/// Shares are gathered for so long before they are sent: one datagram carries many.
const GATHER: Duration = Duration::from_millis(2);
/// How often the index hears how much of a growing content is here.
const HELD_EVERY: Duration = Duration::from_secs(1);
/// How often a watch is renewed; it lapses after three times that.
const WATCH_EVERY: Duration = Duration::from_secs(30);
/// It is renewed no more often, whatever the index says.
const WATCH_SELDOM: Duration = Duration::from_secs(1);

/// What the owner must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send this datagram to the index.
    Send(Vec<u8>),
    /// Fetch session keys at the index's desk, then say [`Link::on_session`] or
    /// [`Link::on_session_failed`].
    NeedSession,
    /// A question was answered, or given up.
    Answered {
        /// Which.
        id: RequestId,
        /// What the index said.
        result: Result<Ack, LinkError>,
    },
    /// The index has acknowledged a share.
    Registered(ContentId),
    /// The index does not take a share; it is no longer kept registered.
    Refused(ContentId, Refusal),
    /// The index has acknowledged that a content is no longer hosted here.
    Withdrawn(ContentId),
    /// The listing changed: rows as they are now.
    Changes {
        /// A row without hosts is gone.
        rows: Vec<Row>,
    },
    /// The watch stands, for the first time or after changes were missed for good: list everything
    /// (again). Changes that come before the list is whole are to be applied after it, in order.
    Relist,
    /// The index has a newer revocation list than it had before.
    RevocationsAt(u32),
    /// The index stopped answering.
    IndexLost,
    /// The index answers (again).
    IndexBack,
}

/// Why a question has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The index said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Nothing came back, however often it was asked.
    #[error("no answer came back")]
    NoAnswer,
    /// More questions are under way than there may be.
    #[error("{MAX_QUESTIONS} questions are under way already")]
    TooMany,
    /// There is no line: this machine is in no network. (Never said by a link.)
    #[error("this machine is in no network")]
    NoNetwork,
}

impl LinkError {
    /// Whose fault it is.
    pub const fn fault(&self) -> Fault {
        match self {
            Self::NoAnswer => Fault::Weather,
            Self::Refused(_) | Self::TooMany | Self::NoNetwork => Fault::Ours,
        }
    }
}

/// A peer's line to the index.
#[derive(Debug)]
pub struct Link {
    dice: Dice,
    port: u16,
    load: Load,
    keys: Option<Keys>,
    desk: Desk,
    desk_waits: Backoff,
    reachable: bool,
    /// The index says that this machine is no member any more.
    removed: bool,
    revocations: u32,
    smoothed_rtt: Option<Duration>,
    /// The index was asked too fast: nothing is sent until then.
    slow_until: Moment,
    questions: BTreeMap<RequestId, Question>,
    next_request: u64,
    shares: BTreeMap<ContentId, Share>,
    /// Sum of the digests of all shares.
    digest: u128,
    /// Shares that the index has yet to hear of, or of which it has yet to hear what is new.
    unsaid: BTreeSet<ContentId>,
    /// Shares of which only more is held now.
    grown: BTreeSet<ContentId>,
    /// Contents withdrawn that the index has yet to hear of.
    gone: BTreeSet<ContentId>,
    round: Option<Round>,
    heartbeat: Duration,
    next_heartbeat: Moment,
    next_held: Moment,
    /// Shares or withdrawals wait to be put into datagrams.
    gather_until: Option<Moment>,
    watch: Option<Picture>,
    outputs: std::collections::VecDeque<Output>,
}

/// The session in use.
struct Keys {
    session: Session,
    counter: u64,
    cookie: [u8; 16],
    renew_at: Moment,
    /// The reply key of the index's current boot.
    boot: Option<(u64, [u8; 16])>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({:?}, epoch {})", self.session.member, self.session.epoch)
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        if let Some((_, key)) = &mut self.boot {
            key.zeroize();
        }
    }
}

/// Where fetching keys stands.
#[derive(Debug)]
enum Desk {
    Idle,
    Asked,
    RetryAt(Moment),
}

#[derive(Debug)]
struct Share {
    item: Item,
    digest: u128,
    /// The owner has yet to hear that it is registered.
    tell: bool,
}

/// Everything is being registered again.
#[derive(Debug)]
struct Round {
    number: u32,
    left: BTreeSet<ContentId>,
    /// The `R` that ends it is under way.
    ending: bool,
}

/// The watch, and how far it is.
#[derive(Debug)]
struct Picture {
    glob: String,
    /// The last change told of; `None` until the index has answered.
    sequence: Option<u64>,
    renew_at: Moment,
    asked: bool,
}

#[derive(Debug)]
struct Question {
    request: Request,
    purpose: Purpose,
    asked: Moment,
    sent: Option<Moment>,
    tries: u32,
    cookies: u32,
    next: Moment,
    wait: Backoff,
}

#[derive(Debug)]
enum Purpose {
    /// The owner asked.
    Owner,
    /// An `R`: these items, in order; the round it belongs to.
    Register(Vec<ContentId>),
    /// A `T`.
    Deregister(Vec<ContentId>),
    /// A `W`.
    Watch,
}

impl Link {
    /// A line without keys; it asks for them at the first [`Link::tick`].
    pub fn new(dice: u64) -> Self {
        let mut dice = Dice(dice);
        Self {
            next_request: dice.next(),
            dice,
            port: 0,
            load: Load::default(),
            keys: None,
            desk: Desk::Idle,
            desk_waits: Backoff::new(SESSION_WAITS.0, SESSION_WAITS.1),
            reachable: false,
            removed: false,
            revocations: 0,
            smoothed_rtt: None,
            slow_until: Moment::ZERO,
            questions: BTreeMap::new(),
            shares: BTreeMap::new(),
            digest: 0,
            unsaid: BTreeSet::new(),
            grown: BTreeSet::new(),
            gone: BTreeSet::new(),
            round: None,
            heartbeat: Duration::from_secs(30),
            next_heartbeat: Moment::ZERO,
            next_held: Moment::ZERO,
            gather_until: None,
            watch: None,
            outputs: std::collections::VecDeque::new(),
        }
    }

    /// The TCP port this peer serves on.
    pub const fn set_port(&mut self, port: u16) {
        self.port = port;
    }

    /// How busy this peer is; told with the next `R`.
    pub const fn set_load(&mut self, load: Load) {
        self.load = load;
    }

    /// New keys: what waits is sent with them, and the index is told at once where this peer is.
    pub fn on_session(&mut self, now: Moment, session: Session) {
        self.heartbeat = Duration::from_secs(u64::from(session.heartbeat_s.max(1)));
        // Three quarters of its life: there is time to try again before it ends.
        let life = Duration::from_secs(u64::from(session.valid_s)).max(SHORTEST_SESSION);
        let renew_at = now + life * 3 / 4;
        if let Some(list) = &session.revocations {
            self.revocations = self.revocations.max(list.version);
        }
        self.keys = Some(Keys { session, counter: 0, cookie: [0; 16], renew_at, boot: None });
        self.desk = Desk::Idle;
        self.removed = false;
        self.desk_waits = Backoff::new(SESSION_WAITS.0, SESSION_WAITS.1);
        self.next_heartbeat = now;
        for question in self.questions.values_mut() {
            question.next = now;
            (question.tries, question.cookies) = (0, 0);
            question.wait = backoff(self.smoothed_rtt);
        }
        self.tick(now);
    }

    /// Fetches keys, and with them a certificate, before it is time: the one at hand is no good by this
    /// machine's clock. While that is so, the owner refuses keys that come with another such
    /// ([`Link::on_session_failed`]), and they are fetched again.
    pub fn renew(&mut self) {
        if matches!(self.desk, Desk::Idle) {
            self.need_session();
        }
    }

    /// The desk could not be reached, or gave no keys.
    pub fn on_session_failed(&mut self, now: Moment) {
        let wait = self.desk_waits.wait();
        // Up to half as much again, so that a thousand peers do not come back in one moment.
        let jitter = self.dice.below(wait.as_micros() as u64 / 2 + 1);
        self.desk = Desk::RetryAt(now + wait + Duration::from_micros(jitter));
        if self.keys.is_none() {
            self.lose(); // with keys it may answer well, and give none that are any good
        }
        // Neither desk nor UDP answers: who waited a while is told.
        let keyless = self.keys.is_none();
        self.give_up(|question| {
            now.since(question.asked) >= KEYLESS_PATIENCE
                && (keyless || question.tries > TRIES_BEFORE_SESSION)
        });
    }

    /// The desk says that this machine was removed from the network: nothing is asked or told any more,
    /// but seldom whether that is still so.
    pub fn on_removed(&mut self, now: Moment) {
        (self.removed, self.keys, self.reachable) = (true, None, false);
        self.gone.clear();
        self.desk = Desk::RetryAt(now + REMOVED_WAIT);
        for (id, question) in std::mem::take(&mut self.questions) {
            match question.purpose {
                Purpose::Owner => {
                    let result = Err(LinkError::Refused(removed()));
                    self.outputs.push_back(Output::Answered { id, result });
                }
                Purpose::Register(ids) => self.say_again(ids),
                Purpose::Deregister(_) => {} // it hosts nothing any more
                Purpose::Watch => {
                    if let Some(watch) = &mut self.watch {
                        watch.asked = false;
                    }
                }
            }
        }
    }

    /// Asks the index something; [`Output::Answered`] follows in any case.
    pub fn ask(&mut self, now: Moment, request: Request) -> RequestId {
        if self.removed {
            let id = self.request_id();
            let result = Err(LinkError::Refused(removed()));
            self.outputs.push_back(Output::Answered { id, result });
            return id;
        }
        if self.questions.len() >= MAX_QUESTIONS {
            let id = self.request_id();
            self.outputs.push_back(Output::Answered { id, result: Err(LinkError::TooMany) });
            return id;
        }
        self.question(now, request, Purpose::Owner)
    }

    /// Keeps `item` registered from now on; said again, it replaces what was said of that content.
    pub fn share(&mut self, now: Moment, item: Item) {
        let (id, digest) = (item.id, digest_of(&item));
        if self.removed {
            self.forget(id);
            return self.outputs.push_back(Output::Refused(id, removed()));
        }
        self.gone.remove(&id);
        self.grown.remove(&id);
        let share = Share { item, digest, tell: true };
        if let Some(old) = self.shares.insert(id, share) {
            self.digest = self.digest.wrapping_sub(old.digest);
        }
        self.digest = self.digest.wrapping_add(digest);
        self.unsaid.insert(id);
        self.gather(now);
    }

    /// More (or less) of a shared content is held now, in thousandths. The index hears of it within
    /// about a second.
    pub fn update_held(&mut self, now: Moment, id: ContentId, held: u16) {
        if let Some(share) = self.shares.get_mut(&id)
            && std::mem::replace(&mut share.item.held, held) != held
            && !self.unsaid.contains(&id)
        {
            if self.grown.is_empty() && self.next_held < now {
                self.next_held = now + GATHER;
            }
            self.grown.insert(id);
        }
    }

    /// Keeps a content registered no longer.
    pub fn withdraw(&mut self, now: Moment, id: ContentId) {
        if self.forget(id) && !self.removed {
            self.gone.insert(id);
            self.gather(now);
        }
    }

    /// Whether withdrawals are still on their way to the index.
    pub fn is_withdrawing(&self) -> bool {
        let under_way = |q: &Question| matches!(q.purpose, Purpose::Deregister(_));
        !self.gone.is_empty() || self.questions.values().any(under_way)
    }

    /// Has changes of the listing told from now on.
    pub fn watch(&mut self, now: Moment, glob: String) {
        if self.watch.as_ref().is_none_or(|watch| watch.glob != glob) {
            self.drop_questions(|purpose| matches!(purpose, Purpose::Watch));
            self.watch = Some(Picture { glob, sequence: None, renew_at: now, asked: false });
        }
    }

    /// Ends the watch.
    pub fn unwatch(&mut self, now: Moment) {
        self.drop_questions(|purpose| matches!(purpose, Purpose::Watch));
        if let Some(watch) = self.watch.take() {
            let request = Watch { glob: watch.glob, since: 0, stop: true };
            self.question(now, Request::Watch(request), Purpose::Watch);
        }
    }

    /// A datagram from the index's address.
    pub fn on_datagram(&mut self, now: Moment, datagram: &mut [u8]) {
        let Ok(head) = ReplyHead::decode(datagram) else { return };
        let Some(keys) = &mut self.keys else { return };
        let session = &keys.session;
        if (head.epoch, head.member, head.salt) != (session.epoch, session.member, session.salt) {
            return;
        }
        let known = keys.boot.filter(|(boot, _)| *boot == head.boot).map(|(_, key)| key);
        let key = known.unwrap_or_else(|| keys.session.keys.reply_key(head.boot));
        let Some(plaintext) = open(&key, head.counter, datagram) else { return };
        let rebooted = keys.boot.is_some_and(|(boot, _)| boot != head.boot);
        if head.kind == b'N' {
            if let (Ok(notice), false) = (Notice::decode(plaintext), rebooted) {
                self.on_notice(now, notice);
            }
            return;
        }
        let Ok((id, reply)) = Reply::decode(head.kind, plaintext) else { return };
        if !self.questions.contains_key(&id) {
            return;
        }
        // Only an answer to a question of ours shows which boot is the newest.
        keys.boot = Some((head.boot, key));
        if rebooted && let Some(watch) = &mut self.watch {
            watch.sequence = None;
            watch.renew_at = now;
        }
        if head.revocations > self.revocations {
            self.revocations = head.revocations;
            self.outputs.push_back(Output::RevocationsAt(head.revocations));
        }
        if !std::mem::replace(&mut self.reachable, true) {
            self.outputs.push_back(Output::IndexBack);
            // What waits longest would else be taken for a sign that the index is silent still.
            for question in self.questions.values_mut() {
                question.tries = question.tries.min(1);
                (question.next, question.wait) = (now, backoff(self.smoothed_rtt));
            }
        }
        self.on_reply(now, id, reply);
        self.tick(now);
    }

    /// Sends what is due.
    pub fn tick(&mut self, now: Moment) {
        self.tend_session(now);
        self.give_up(|question| {
            now.since(question.asked) >= PATIENCE || question.tries > MAX_TRIES
        });
        if self.keys.is_some() {
            self.tend_held(now);
            self.tend_batches(now);
            self.tend_watch(now);
            self.send_due(now);
        }
    }

    /// The next thing to be done.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Link::tick`] is due.
    pub fn next_deadline(&self) -> Option<Moment> {
        let session = match (&self.desk, &self.keys) {
            (Desk::Asked, _) => None,
            (Desk::RetryAt(at), _) => Some(*at),
            (Desk::Idle, None) => Some(Moment::ZERO),
            (Desk::Idle, Some(keys)) => Some(keys.renew_at),
        };
        let patience = self.questions.values().map(|q| q.asked + PATIENCE).min();
        let mut due = vec![session, patience];
        if self.keys.is_some() {
            let next = self.questions.values().map(|question| question.next).min();
            due.push(next.map(|next| next.max(self.slow_until)));
            due.push(Some(self.next_heartbeat));
            due.push((!self.grown.is_empty()).then_some(self.next_held));
            let room = self.batches() < MAX_BATCHES;
            due.push(self.gather_until.filter(|_| room));
            due.push(self.watch.as_ref().filter(|w| !w.asked).map(|w| w.renew_at));
        }
        due.into_iter().flatten().min()
    }

    /// Panics where an invariant broke.
    pub fn check(&self) {
        let sum = self.shares.values().fold(0u128, |sum, s| sum.wrapping_add(digest_of(&s.item)));
        assert_eq!(sum, self.digest, "the digest is that of the shares");
        assert!(self.unsaid.iter().all(|id| self.shares.contains_key(id)), "unsaid are shared");
        assert!(self.grown.iter().all(|id| self.shares.contains_key(id)), "grown are shared");
        assert!(self.gone.iter().all(|id| !self.shares.contains_key(id)), "gone are not shared");
        assert!(self.batches() <= MAX_BATCHES + 1, "few batches are under way");
        assert!(self.questions.len() <= MAX_QUESTIONS + MAX_BATCHES + 2, "questions are bounded");
    }

    // ---- keys

    fn tend_session(&mut self, now: Moment) {
        let due = match (&self.desk, &self.keys) {
            (Desk::Asked, _) => false,
            (Desk::RetryAt(at), _) => *at <= now,
            (Desk::Idle, None) => true,
            (Desk::Idle, Some(keys)) => keys.renew_at <= now,
        };
        if due {
            self.need_session();
        }
    }

    fn need_session(&mut self) {
        if !matches!(self.desk, Desk::Asked) {
            self.desk = Desk::Asked;
            self.outputs.push_back(Output::NeedSession);
        }
    }

    fn lose(&mut self) {
        if std::mem::take(&mut self.reachable) {
            self.outputs.push_back(Output::IndexLost);
        }
    }

    // ---- questions

    fn request_id(&mut self) -> RequestId {
        self.next_request = self.next_request.wrapping_add(1);
        RequestId(self.next_request)
    }

    fn question(&mut self, now: Moment, request: Request, purpose: Purpose) -> RequestId {
        let id = self.request_id();
        let wait = backoff(self.smoothed_rtt);
        let (sent, tries, cookies) = (None, 0, 0);
        let question =
            Question { request, purpose, asked: now, sent, tries, cookies, next: now, wait };
        self.questions.insert(id, question);
        if self.keys.is_some() {
            self.send_due(now);
        }
        id
    }

    fn send_due(&mut self, now: Moment) {
        if now < self.slow_until {
            return;
        }
        let mut silent = false;
        let Some(keys) = &mut self.keys else { return };
        for (id, question) in &mut self.questions {
            if question.next > now {
                continue;
            }
            question.tries += 1;
            question.sent = Some(now);
            question.next = now + question.wait.wait();
            silent |= question.tries > TRIES_BEFORE_SESSION;
            if question.tries <= MAX_TRIES {
                let datagram = seal_with(keys, &question.request, *id);
                self.outputs.push_back(Output::Send(datagram));
            }
        }
        if silent {
            self.lose();
            if matches!(self.desk, Desk::Idle) {
                self.need_session();
            }
        }
    }

    /// Gives up the owner's questions that `hopeless` says; the link's own are asked for ever.
    fn give_up(&mut self, hopeless: impl Fn(&Question) -> bool) {
        let lost: Vec<RequestId> =
            self.questions.iter().filter(|(_, q)| hopeless(q)).map(|(id, _)| *id).collect();
        for id in lost {
            let Some(question) = self.questions.remove(&id) else { continue };
            match question.purpose {
                Purpose::Owner => {
                    let result = Err(LinkError::NoAnswer);
                    self.outputs.push_back(Output::Answered { id, result });
                }
                // Begun anew, so that it says what is the case then.
                Purpose::Register(ids) => self.say_again(ids),
                Purpose::Deregister(ids) => {
                    let not_again = |id: &ContentId| !self.shares.contains_key(id);
                    self.gone.extend(ids.into_iter().filter(not_again));
                }
                Purpose::Watch => {
                    if let Some(watch) = &mut self.watch {
                        watch.asked = false;
                    }
                }
            }
            self.gather_until = self.gather_until.or(Some(Moment::ZERO));
        }
    }

    fn drop_questions(&mut self, which: impl Fn(&Purpose) -> bool) {
        self.questions.retain(|_, question| !which(&question.purpose));
    }

    fn say_again(&mut self, ids: Vec<ContentId>) {
        self.unsaid.extend(ids.into_iter().filter(|id| self.shares.contains_key(id)));
        if let Some(round) = &mut self.round {
            round.ending = false;
        }
    }

    fn on_reply(&mut self, now: Moment, id: RequestId, reply: Reply) {
        let Some(mut question) = self.questions.remove(&id) else { return };
        if let (Some(sent), 1) = (question.sent, question.tries) {
            let sample = now.since(sent);
            let smoothed = self.smoothed_rtt.unwrap_or(sample);
            self.smoothed_rtt = Some((smoothed * 7 + sample) / 8);
        }
        match reply {
            Reply::Error(Refusal { code: Code::CookieNeeded, cookie: Some(cookie), .. }) => {
                if let Some(keys) = &mut self.keys {
                    keys.cookie = cookie;
                }
                question.cookies += 1;
                if question.cookies <= MAX_COOKIES {
                    question.next = now;
                    question.tries = question.tries.saturating_sub(1);
                }
                self.questions.insert(id, question);
            }
            Reply::Error(Refusal { code: Code::SessionOver, .. }) => {
                question.next = now + LONGEST_WAIT;
                self.questions.insert(id, question);
                if matches!(self.desk, Desk::Idle) {
                    self.need_session();
                }
            }
            // What else is under way is passed over without a word: it waits as well, and all of it is
            // sent anew. The index is not silent for that.
            Reply::Error(Refusal { code: Code::TooFast, .. }) => {
                self.slow_until = now + SLOW_DOWN;
                question.next = now;
                self.questions.insert(id, question);
                for question in self.questions.values_mut() {
                    question.tries = question.tries.min(1);
                }
            }
            reply => self.on_answer(now, id, question, reply),
        }
    }

    fn on_answer(&mut self, now: Moment, id: RequestId, question: Question, reply: Reply) {
        match (question.purpose, reply) {
            (Purpose::Owner, Reply::Ack(ack)) => {
                self.outputs.push_back(Output::Answered { id, result: Ok(ack) });
            }
            (Purpose::Owner, Reply::Error(refusal)) => {
                let result = Err(LinkError::Refused(refusal));
                self.outputs.push_back(Output::Answered { id, result });
            }
            (Purpose::Register(ids), Reply::Ack(Ack::Registered(registered))) => {
                self.on_registered(now, ids, &question.request, registered);
            }
            (Purpose::Register(ids), Reply::Error(refusal)) => {
                for id in ids {
                    self.refused(id, refusal.clone());
                }
            }
            (Purpose::Deregister(ids), _) => {
                self.outputs.extend(ids.into_iter().map(Output::Withdrawn));
                self.gather(now);
            }
            (Purpose::Watch, Reply::Ack(Ack::Watching(watching))) => {
                self.on_watching(now, watching);
            }
            // An answer of another kind than asked for: as if none had come.
            (Purpose::Register(ids), Reply::Ack(_)) => self.say_again(ids),
            (Purpose::Watch, _) => {
                if let Some(watch) = &mut self.watch {
                    (watch.asked, watch.renew_at) = (false, now + WATCH_EVERY);
                }
            }
        }
    }

    // ---- registrations

    fn gather(&mut self, now: Moment) {
        self.gather_until = self.gather_until.or(Some(now + GATHER));
    }

    /// Forgets a share; whether there was one.
    fn forget(&mut self, id: ContentId) -> bool {
        self.unsaid.remove(&id);
        self.grown.remove(&id);
        if let Some(round) = &mut self.round {
            round.left.remove(&id);
        }
        match self.shares.remove(&id) {
            Some(share) => {
                self.digest = self.digest.wrapping_sub(share.digest);
                true
            }
            None => false,
        }
    }

    fn refused(&mut self, id: ContentId, refusal: Refusal) {
        if self.forget(id) {
            self.outputs.push_back(Output::Refused(id, refusal));
        }
    }

    fn tend_held(&mut self, now: Moment) {
        if !self.grown.is_empty() && self.next_held <= now {
            self.next_held = now + HELD_EVERY;
            let grown = std::mem::take(&mut self.grown);
            self.unsaid.extend(grown);
            self.gather_until = Some(now);
        }
    }

    fn batches(&self) -> usize {
        let batch =
            |q: &&Question| matches!(q.purpose, Purpose::Register(_) | Purpose::Deregister(_));
        self.questions.values().filter(batch).count()
    }

    /// Contents that an `R` (or a `T`) under way speaks of: said again only when it is answered.
    fn under_way(&self) -> BTreeSet<ContentId> {
        let of = |q: &Question| match &q.purpose {
            Purpose::Register(ids) | Purpose::Deregister(ids) => ids.clone(),
            Purpose::Owner | Purpose::Watch => Vec::new(),
        };
        self.questions.values().flat_map(of).collect()
    }

    fn tend_batches(&mut self, now: Moment) {
        if self.gather_until.is_some_and(|at| at <= now) {
            self.gather_until = None;
            while self.batches() < MAX_BATCHES && self.send_batch(now) {}
        }
        let registering =
            self.questions.values().any(|q| matches!(q.purpose, Purpose::Register(_)));
        if self.next_heartbeat <= now {
            self.next_heartbeat = now + self.heartbeat;
            if !registering {
                self.register(now, Vec::new());
            }
        }
    }

    /// Puts what waits into one more datagram; false where nothing waits that can go now.
    fn send_batch(&mut self, now: Moment) -> bool {
        let busy = self.under_way();
        let gone: Vec<ContentId> = self
            .gone
            .iter()
            .filter(|id| !busy.contains(id))
            .take(Request::MAX_DEREGISTER)
            .copied()
            .collect();
        if !gone.is_empty() {
            gone.iter().for_each(|id| {
                self.gone.remove(id);
            });
            self.question(now, Request::Deregister(gone.clone()), Purpose::Deregister(gone));
            return true;
        }
        let (mut batch, mut room) = (Vec::new(), ITEMS_ROOM);
        let round = self.round.iter().flat_map(|round| &round.left);
        for id in self.unsaid.iter().chain(round) {
            let Some(share) = self.shares.get(id) else { continue };
            let len = share.item.wire_len();
            if busy.contains(id) || batch.contains(id) {
                continue;
            }
            if len > room || batch.len() == usize::from(u8::MAX) {
                break;
            }
            room -= len;
            batch.push(*id);
        }
        if !batch.is_empty() {
            self.register(now, batch);
            return true;
        }
        if let Some(round) = &mut self.round
            && !round.ending
            && busy.is_empty()
        {
            round.ending = true;
            self.register(now, Vec::new());
            return true;
        }
        false
    }

    fn register(&mut self, now: Moment, ids: Vec<ContentId>) {
        for id in &ids {
            self.unsaid.remove(id);
            if let Some(round) = &mut self.round {
                round.left.remove(id);
            }
        }
        let on_their_way = !ids.is_empty()
            || !self.unsaid.is_empty()
            || !self.gone.is_empty()
            || self.round.is_some()
            || self.batches() > 0;
        let digest = if on_their_way { 0 } else { self.digest };
        // Who shares nothing says so with a whole round in one: what an earlier run left is forgotten. What
        // is shared before that was heard belongs to the round: else it would be forgotten where the
        // end of the round is lost, and said again after the share was acknowledged.
        if self.shares.is_empty() && !on_their_way {
            let number = self.dice.next() as u32 | 1;
            self.round = Some(Round { number, left: BTreeSet::new(), ending: true });
        }
        let ends = ids.is_empty() && self.round.as_ref().is_some_and(|round| round.ending);
        let items = ids.iter().filter_map(|id| self.shares.get(id)).map(|s| s.item.clone());
        let register = Register {
            port: self.port,
            load: self.load,
            digest: digest.to_le_bytes(),
            round: self.round.as_ref().map_or(0, |round| round.number),
            round_ends: ends,
            items: items.collect(),
        };
        self.next_heartbeat = now + self.heartbeat;
        self.question(now, Request::Register(register), Purpose::Register(ids));
    }

    fn on_registered(
        &mut self,
        now: Moment,
        ids: Vec<ContentId>,
        request: &Request,
        registered: Registered,
    ) {
        self.heartbeat = Duration::from_secs(u64::from(registered.heartbeat_s.max(1)));
        self.next_heartbeat = self.next_heartbeat.min(now + self.heartbeat);
        let mut refused: BTreeMap<usize, Refusal> =
            registered.refused.into_iter().map(|(at, why)| (usize::from(at), why)).collect();
        for (at, id) in ids.into_iter().enumerate() {
            if let Some(refusal) = refused.remove(&at) {
                // What was said of it meanwhile may be taken: only the same item is given up.
                if !self.unsaid.contains(&id) {
                    self.refused(id, refusal);
                }
            } else if let Some(share) = self.shares.get_mut(&id)
                && !self.unsaid.contains(&id)
                && std::mem::take(&mut share.tell)
            {
                self.outputs.push_back(Output::Registered(id));
            }
        }
        let ended = matches!(request, Request::Register(r) if r.round_ends);
        if ended && self.round.as_ref().is_some_and(|round| round.ending) {
            self.round = None;
        }
        // Not at once after a round: an index that is never content is told again with the next heartbeat.
        if registered.repeat_all && self.round.is_none() && !ended {
            let number = self.dice.next() as u32 | 1;
            let left = self.shares.keys().copied().collect();
            self.round = Some(Round { number, left, ending: false });
        }
        if self.round.is_some() || !self.unsaid.is_empty() || !self.gone.is_empty() {
            self.gather_until = Some(now);
        }
    }

    // ---- the live listing

    fn tend_watch(&mut self, now: Moment) {
        let Some(watch) = &mut self.watch else { return };
        if watch.asked || watch.renew_at > now {
            return;
        }
        watch.asked = true;
        let request =
            Watch { glob: watch.glob.clone(), since: watch.sequence.unwrap_or(0), stop: false };
        self.question(now, Request::Watch(request), Purpose::Watch);
    }

    fn on_watching(&mut self, now: Moment, watching: Watching) {
        let Some(watch) = &mut self.watch else { return };
        watch.asked = false;
        let lease = Duration::from_secs(u64::from(watching.lease_s));
        watch.renew_at = now + (lease / 3).clamp(WATCH_SELDOM, WATCH_EVERY);
        // Only now: what changes while the owner lists is told, so nothing falls between the two.
        if watching.missed || watch.sequence.is_none() {
            watch.sequence = Some(watching.sequence);
            self.outputs.push_back(Output::Relist);
        }
    }

    fn on_notice(&mut self, now: Moment, notice: Notice) {
        let Some(watch) = &mut self.watch else { return };
        let Some(sequence) = watch.sequence else { return };
        if notice.after <= sequence {
            return;
        }
        if notice.before > sequence {
            // Some were lost: the index tells again what came since.
            watch.renew_at = now;
            self.tend_watch(now);
            return;
        }
        watch.sequence = Some(notice.after);
        if !notice.rows.is_empty() {
            self.outputs.push_back(Output::Changes { rows: notice.rows });
        }
    }
}

fn removed() -> Refusal {
    let text = "this machine was removed from the network".to_owned();
    Refusal { code: Code::Removed, text, cookie: None }
}

fn backoff(smoothed_rtt: Option<Duration>) -> Backoff {
    let first = smoothed_rtt.map_or(FIRST_WAIT, |rtt| FIRST_WAIT.max(rtt * 3));
    Backoff::new(first.min(LONGEST_WAIT), LONGEST_WAIT)
}

/// Every datagram, also of a repeated question, has a counter of its own: the nonce.
fn seal_with(keys: &mut Keys, request: &Request, id: RequestId) -> Vec<u8> {
    let head = RequestHead {
        kind: request.kind(),
        epoch: keys.session.epoch,
        member: keys.session.member,
        salt: keys.session.salt,
        counter: keys.counter,
        cookie: keys.cookie,
    };
    keys.counter += 1;
    seal_request(&keys.session.keys.to_index, &head, &request.encode(id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::MemberNumber;
    use crate::seal::{EpochSecret, SessionKeys, seal_reply};
    use crate::time::WallTime;
    use crate::trust::{Certificate, MachineKey, Role};
    use crate::wire::datagram::{HELD_ALL, List, RowKey};

    const MS: Duration = Duration::from_millis(1);

    /// The index's end of the line, as little of it as a link needs.
    struct Index {
        keys: SessionKeys,
        boot: u64,
        counter: u64,
    }

    fn session() -> (Session, Index) {
        let index = MachineKey::from_seed([1; 32]);
        let peer = MachineKey::from_seed([2; 32]).peer();
        let member = MemberNumber(7);
        let keys = EpochSecret([3; 32]).session(index.network(), member, 9);
        let session = Session {
            member,
            epoch: 4,
            salt: 9,
            keys: keys.clone(),
            heartbeat_s: 30,
            valid_s: 86_400,
            certificate: Certificate::issue(&index, peer, member, Role::Publish, "b", WallTime(9)),
            revocations: None,
        };
        (session, Index { keys, boot: 1, counter: 0 })
    }

    impl Index {
        fn read(&self, datagram: &[u8]) -> (RequestHead, RequestId, Request) {
            let head = RequestHead::decode(datagram).unwrap();
            let mut copy = datagram.to_vec();
            let plain = open(&self.keys.to_index, head.counter, &mut copy).unwrap();
            let (id, request) = Request::decode(head.kind, plain).unwrap();
            (head, id, request)
        }

        fn seal(&mut self, kind: u8, plaintext: &[u8]) -> Vec<u8> {
            self.counter += 1;
            let head = ReplyHead {
                kind,
                epoch: 4,
                member: MemberNumber(7),
                salt: 9,
                counter: self.counter,
                boot: self.boot,
                revocations: 0,
                flags: 0,
            };
            seal_reply(&self.keys.reply_key(self.boot), &head, plaintext)
        }

        fn reply(&mut self, to: RequestId, reply: &Reply) -> Vec<u8> {
            self.seal(reply.kind(), &reply.encode(to))
        }

        fn registered(&mut self, to: RequestId, repeat_all: bool) -> Vec<u8> {
            let ack = Registered { lease_s: 90, heartbeat_s: 30, repeat_all, refused: vec![] };
            self.reply(to, &Reply::Ack(Ack::Registered(ack)))
        }
    }

    fn sent(link: &mut Link) -> Vec<Vec<u8>> {
        outputs(link)
            .into_iter()
            .filter_map(|o| if let Output::Send(d) = o { Some(d) } else { None })
            .collect()
    }

    fn outputs(link: &mut Link) -> Vec<Output> {
        link.check();
        std::iter::from_fn(|| link.poll_output()).collect()
    }

    fn item(n: u8) -> Item {
        Item { id: ContentId::file([n; 32]), size: 10, held: HELD_ALL, name: None }
    }

    fn list() -> Request {
        Request::List(List { glob: "*".into(), after: None })
    }

    /// A link with keys whose first heartbeat was answered.
    fn standing() -> (Link, Index, Moment) {
        let (session, mut index) = session();
        let (mut link, now) = (Link::new(5), Moment::from_micros(1_000_000));
        link.tick(now);
        assert_eq!(outputs(&mut link), [Output::NeedSession]);
        link.on_session(now, session);
        let first = sent(&mut link);
        let (_, id, request) = index.read(&first[0]);
        assert!(matches!(request, Request::Register(r) if r.items.is_empty() && r.round_ends));
        link.on_datagram(now, &mut index.registered(id, false));
        assert_eq!(outputs(&mut link), [Output::IndexBack]);
        (link, index, now)
    }

    /// What was registered since the last call.
    fn registers(link: &mut Link, index: &Index) -> Vec<(RequestId, Register)> {
        let register = |datagram: &Vec<u8>| match index.read(datagram) {
            (_, id, Request::Register(register)) => (id, register),
            (.., other) => panic!("{other:?}"),
        };
        sent(link).iter().map(register).collect()
    }

    #[test]
    fn a_round_ends_when_all_of_it_was_heard_or_the_index_would_forget_what_was_lost() {
        let (mut link, mut index, now) = standing();
        (1..=60).for_each(|n| link.share(now, item(n)));
        link.tick(now + GATHER);
        let mut under_way: std::collections::VecDeque<_> = registers(&mut link, &index).into();
        assert!(under_way.len() > 1);
        let (mut repeat_all, mut ended) = (true, false);
        while let Some((id, register)) = under_way.pop_front() {
            ended |= register.round_ends;
            let mut answer = index.registered(id, std::mem::take(&mut repeat_all));
            link.on_datagram(now + GATHER, &mut answer);
            let more = registers(&mut link, &index);
            let ends = more.iter().any(|(_, register)| register.round_ends);
            assert!(!ends || (under_way.is_empty() && more.len() == 1), "others are under way");
            under_way.extend(more);
        }
        assert!(ended);
    }

    #[test]
    fn what_is_shared_before_the_word_that_nothing_is_was_heard_is_not_forgotten_by_it() {
        let (session, mut index) = session();
        let (mut link, now) = (Link::new(5), Moment::from_micros(1_000_000));
        link.on_session(now, session);
        let [(ends, nothing)] = &registers(&mut link, &index)[..] else { panic!() };
        assert!(nothing.round_ends && nothing.round != 0);
        link.share(now, item(1));
        link.tick(now + GATHER);
        let [(id, first)] = &registers(&mut link, &index)[..] else { panic!() };
        assert_eq!((first.round, first.round_ends), (nothing.round, false), "of that round");
        link.on_datagram(now + GATHER, &mut index.registered(*id, false));
        assert!(outputs(&mut link).contains(&Output::Registered(item(1).id)));
        // The other was lost, and is said again: it ends the round that has named the share.
        link.tick(now + Duration::from_secs(1));
        let [(again, last)] = &registers(&mut link, &index)[..] else { panic!() };
        assert_eq!((again, last), (ends, nothing));
        link.on_datagram(now + Duration::from_secs(1), &mut index.registered(*again, false));
        link.share(now, item(2));
        link.tick(now + Duration::from_secs(2));
        let [(_, second)] = &registers(&mut link, &index)[..] else { panic!() };
        assert_eq!(second.round, 0, "the round is over");
    }

    /// Each was done again at once, and so without pause.
    #[test]
    fn an_index_that_is_never_content_is_not_asked_or_told_without_pause() {
        let (mut link, mut index, mut now) = standing();
        let short = || Session { valid_s: 0, heartbeat_s: 0, ..session().0 };
        link.on_session(now, short());
        (1..=10).for_each(|n| link.share(now, item(n)));
        link.watch(now, "*".into());
        link.ask(now, list());
        let end = now + Duration::from_secs(60);
        let (mut said, mut sessions) = (BTreeMap::<u8, u32>::new(), 0);
        while now < end {
            for output in outputs(&mut link) {
                match output {
                    Output::Send(datagram) => {
                        *said.entry(datagram[0]).or_default() += 1;
                        let (_, id, request) = index.read(&datagram);
                        let mut answer = match request {
                            Request::Register(_) => index.registered(id, true),
                            Request::Watch(_) => {
                                let (lease_s, sequence, missed) = (0, 0, true);
                                let watching = Watching { lease_s, sequence, missed };
                                index.reply(id, &Reply::Ack(Ack::Watching(watching)))
                            }
                            _ => {
                                let (code, text) = (Code::CookieNeeded, String::new());
                                let cookie = Some([said[&datagram[0]] as u8; 16]);
                                index.reply(id, &Reply::Error(Refusal { code, text, cookie }))
                            }
                        };
                        link.on_datagram(now, &mut answer);
                    }
                    Output::NeedSession => {
                        sessions += 1;
                        link.on_session(now, short());
                    }
                    _ => {}
                }
            }
            now = now + MS;
            link.tick(now);
        }
        assert!((1..=6).contains(&sessions), "{sessions}");
        // A heartbeat each 30 s (and one with each session), a round of two after it, the first shares.
        assert!(said[&b'R'] <= 20, "{said:?}");
        assert!((20..=70).contains(&said[&b'W']), "{said:?}");
        assert!(said[&b'O'] <= 60, "{said:?}");
    }

    #[test]
    fn a_machine_that_was_removed_says_no_more_and_seldom_asks_whether_it_still_is() {
        let (mut link, _, mut now) = standing();
        link.share(now, item(1));
        let asked = link.ask(now, list());
        link.on_removed(now);
        let no = |id| Output::Answered { id, result: Err(LinkError::Refused(removed())) };
        assert!(outputs(&mut link).contains(&no(asked)));
        let asked = link.ask(now, list());
        link.share(now, item(2));
        assert_eq!(outputs(&mut link), [no(asked), Output::Refused(item(2).id, removed())]);
        let end = now + Duration::from_secs(3_600);
        let mut sessions = 0;
        while now < end {
            now = link.next_deadline().map_or(end, |due| due.max(now + MS));
            link.tick(now);
            for output in outputs(&mut link) {
                assert_eq!(output, Output::NeedSession);
                sessions += 1;
                link.on_removed(now);
            }
        }
        assert!((30..=61).contains(&sessions), "{sessions}");
        // It is one again: what it hosts is told.
        let (session, index) = session();
        link.on_session(now, session);
        link.tick(now + GATHER);
        let told = registers(&mut link, &index);
        assert!(told.iter().any(|(_, register)| register.items.len() == 1), "{told:?}");
    }

    #[test]
    fn a_digest_is_sent_only_when_the_index_can_have_heard_of_everything() {
        let (mut link, mut index, now) = standing();
        link.share(now, item(1));
        link.tick(now + GATHER);
        let said = registers(&mut link, &index);
        let [(id, first)] = &said[..] else { panic!("{said:?}") };
        assert_eq!((first.items.len(), first.digest), (1, [0; 16]), "it is on its way");
        link.on_datagram(now + GATHER, &mut index.registered(*id, false));
        link.tick(now + Duration::from_secs(31));
        let said = registers(&mut link, &index);
        let [(_, beat)] = &said[..] else { panic!("{said:?}") };
        assert_eq!((beat.items.len(), beat.digest), (0, digest_of(&item(1)).to_le_bytes()));
    }

    #[test]
    fn a_watch_begins_anew_with_an_index_that_was_restarted() {
        let (mut link, mut index, now) = standing();
        link.watch(now, "*".to_owned());
        link.tick(now);
        let watch = sent(&mut link).pop().expect("it watches");
        let (_, id, _) = index.read(&watch);
        let watching = Watching { lease_s: 90, sequence: 500, missed: false };
        link.on_datagram(now, &mut index.reply(id, &Reply::Ack(Ack::Watching(watching))));
        assert!(outputs(&mut link).contains(&Output::Relist));
        link.ask(now, list());
        let (_, id, _) = index.read(&sent(&mut link)[0]);
        index.boot = 2;
        let refusal = Refusal { code: Code::NotFound, text: String::new(), cookie: None };
        link.on_datagram(now, &mut index.reply(id, &Reply::Error(refusal)));
        let watch = sent(&mut link).pop().expect("it watches again");
        let (.., Request::Watch(watch)) = index.read(&watch) else { panic!("no watch") };
        assert_eq!(watch.since, 0, "its changes are counted anew");
    }

    #[test]
    fn an_index_that_answers_again_is_not_taken_for_silent_because_of_what_was_asked_before() {
        // Seen in the simulation of everything: of several questions that had waited for an index that was
        // down, one was answered, and the others, tried often by then, made it count as lost at once.
        let (mut link, mut index, mut now) = standing();
        link.ask(now, list());
        let mut last = vec![];
        for _ in 0..600 {
            now = now + 10 * MS;
            link.tick(now);
            last.extend(sent(&mut link));
        }
        link.ask(now, list());
        let first = sent(&mut link).pop().expect("it is asked at once");
        let (_, id, _) = index.read(&first);
        let refusal = Refusal { code: Code::NotFound, text: String::new(), cookie: None };
        link.on_datagram(now, &mut index.reply(id, &Reply::Error(refusal)));
        let mut said = outputs(&mut link);
        for _ in 0..20 {
            now = now + 10 * MS;
            link.tick(now);
            said.extend(outputs(&mut link));
        }
        assert!(said.contains(&Output::IndexBack));
        assert!(!said.contains(&Output::IndexLost), "{said:?}");
    }

    #[test]
    fn a_line_that_was_asked_too_fast_says_nothing_for_a_second_and_then_all_of_it_again() {
        let (mut link, mut index, mut now) = standing();
        (1..=200).for_each(|n| link.share(now, item(n)));
        link.ask(now, list());
        let mut waits = sent(&mut link);
        now = now + GATHER;
        link.tick(now);
        waits.extend(sent(&mut link));
        assert_eq!(waits.len(), 1 + MAX_BATCHES);
        for _ in 0..10 {
            // One of them is refused, the others are passed over.
            let (_, id, _) = index.read(&waits[0]);
            let refusal = Refusal { code: Code::TooFast, text: String::new(), cookie: None };
            link.on_datagram(now, &mut index.reply(id, &Reply::Error(refusal)));
            link.tick(now + SLOW_DOWN - MS);
            assert_eq!(outputs(&mut link), [], "neither datagrams, nor does it count as lost");
            assert_eq!(link.next_deadline(), Some(now + SLOW_DOWN));
            now = now + SLOW_DOWN;
            link.tick(now);
            waits = sent(&mut link);
            assert_eq!(waits.len(), 1 + MAX_BATCHES);
        }
        assert_eq!(link.questions.len(), 1 + MAX_BATCHES);
    }

    #[test]
    fn an_unanswered_question_is_asked_again_and_then_given_up() {
        let (mut link, index, mut now) = standing();
        let id = link.ask(now, list());
        let (mut tries, mut counters, mut answer) = (0, BTreeSet::new(), None);
        while answer.is_none() {
            for output in outputs(&mut link) {
                match output {
                    Output::Send(datagram) if datagram[0] == b'O' => {
                        let (head, request, _) = index.read(&datagram);
                        assert_eq!(request, id, "a repeated question keeps its number");
                        assert!(counters.insert(head.counter), "a nonce is never used twice");
                        tries += 1;
                    }
                    Output::Answered { id: of, result } if of == id => answer = Some(result),
                    _ => {}
                }
            }
            now = link.next_deadline().unwrap().max(now);
            link.tick(now);
        }
        assert_eq!(answer, Some(Err(LinkError::NoAnswer)));
        assert!((12..=16).contains(&tries), "{tries} tries");
    }

    #[test]
    fn a_cookie_is_taken_and_the_question_repeated_at_once() {
        let (mut link, mut index, now) = standing();
        let id = link.ask(now, list());
        assert_eq!(sent(&mut link).len(), 1);
        let refusal =
            Refusal { code: Code::CookieNeeded, text: String::new(), cookie: Some([6; 16]) };
        link.on_datagram(now, &mut index.reply(id, &Reply::Error(refusal)));
        let again = sent(&mut link);
        assert_eq!(index.read(&again[0]).0.cookie, [6; 16]);
        assert_eq!(index.read(&again[0]).1, id);
    }

    #[test]
    fn shares_travel_together_and_a_differing_digest_repeats_them_in_a_round() {
        let (mut link, mut index, mut now) = standing();
        for n in 0..60 {
            link.share(now, item(n));
        }
        now = now + GATHER;
        let (mut named, mut registered) = (0, 0);
        let drive =
            |link: &mut Link, index: &mut Index, now, named: &mut usize, registered: &mut usize| {
                let mut rounds = vec![];
                loop {
                    link.tick(now);
                    let all = outputs(link);
                    *registered +=
                        all.iter().filter(|o| matches!(o, Output::Registered(_))).count();
                    let datagrams: Vec<_> = all
                        .into_iter()
                        .filter_map(|o| if let Output::Send(d) = o { Some(d) } else { None })
                        .collect();
                    if datagrams.is_empty() {
                        return rounds;
                    }
                    for datagram in datagrams {
                        let (_, id, request) = index.read(&datagram);
                        let Request::Register(r) = request else { panic!("only R is expected") };
                        *named += r.items.len();
                        rounds.push((r.round, r.round_ends, r.digest));
                        link.on_datagram(now, &mut index.registered(id, false));
                    }
                }
            };
        drive(&mut link, &mut index, now, &mut named, &mut registered);
        assert_eq!((named, registered), (60, 60));
        // The next heartbeat carries the digest; the index says that its own differs.
        now = now + Duration::from_secs(31);
        link.tick(now);
        let beat = sent(&mut link);
        let (_, id, request) = index.read(&beat[0]);
        let Request::Register(r) = request else { panic!("a heartbeat is an R") };
        let sum = (0..60).fold(0u128, |sum, n| sum.wrapping_add(digest_of(&item(n))));
        assert_eq!((r.items.len(), r.digest), (0, sum.to_le_bytes()));
        link.on_datagram(now, &mut index.registered(id, true));
        let rounds = drive(&mut link, &mut index, now, &mut named, &mut registered);
        assert_eq!((named, registered), (120, 60), "told once, named again");
        assert!(rounds.iter().all(|(round, ..)| *round == rounds[0].0 && *round != 0));
        assert_eq!(rounds.iter().filter(|(_, ends, _)| *ends).count(), 1);
        assert!(rounds.last().unwrap().1, "the end comes last");
    }

    #[test]
    fn a_refused_share_is_told_and_kept_no_longer() {
        let (mut link, mut index, now) = standing();
        link.share(now, item(1));
        link.share(now, item(2));
        link.tick(now + GATHER);
        let r = sent(&mut link);
        let refusal = Refusal { code: Code::Quota, text: "full".into(), cookie: None };
        let ack = Registered {
            lease_s: 90,
            heartbeat_s: 30,
            repeat_all: false,
            refused: vec![(1, refusal.clone())],
        };
        let id = index.read(&r[0]).1;
        link.on_datagram(now, &mut index.reply(id, &Reply::Ack(Ack::Registered(ack))));
        assert_eq!(
            outputs(&mut link),
            [Output::Registered(item(1).id), Output::Refused(item(2).id, refusal)]
        );
    }

    #[test]
    fn a_withdrawal_waits_for_the_registration_under_way() {
        let (mut link, mut index, now) = standing();
        link.share(now, item(1));
        link.tick(now + GATHER);
        let r = sent(&mut link);
        link.withdraw(now, item(1).id);
        link.tick(now + GATHER * 3);
        assert_eq!(sent(&mut link), Vec::<Vec<u8>>::new(), "T must not overtake R");
        let id = index.read(&r[0]).1;
        link.on_datagram(now + GATHER * 4, &mut index.registered(id, false));
        let t = sent(&mut link);
        let (_, id, request) = index.read(&t[0]);
        assert_eq!(request, Request::Deregister(vec![item(1).id]));
        assert!(link.is_withdrawing());
        link.on_datagram(now + GATHER * 4, &mut index.reply(id, &Reply::Ack(Ack::Deregistered)));
        assert_eq!(outputs(&mut link), [Output::Withdrawn(item(1).id)]);
        assert!(!link.is_withdrawing());
    }

    #[test]
    fn a_content_shared_again_while_its_withdrawal_is_under_way_stays_shared() {
        let (mut link, mut index, mut now) = standing();
        link.share(now, item(1));
        now = now + GATHER;
        link.tick(now);
        let id = index.read(&sent(&mut link)[0]).1;
        link.on_datagram(now, &mut index.registered(id, false));
        link.withdraw(now, item(1).id);
        now = now + GATHER;
        link.tick(now);
        assert!(sent(&mut link).iter().any(|datagram| datagram[0] == b'T'));
        link.share(now, item(1));
        // Nobody answers until the withdrawal is given up; only the share is told from then on.
        let given_up = now + PATIENCE;
        while now < given_up {
            now = link.next_deadline().unwrap().max(now + MS);
            link.tick(now);
            outputs(&mut link);
        }
        link.tick(now + GATHER);
        link.tick(now + LONGEST_WAIT * 2);
        let told = sent(&mut link);
        assert!(told.iter().any(|datagram| datagram[0] == b'R'));
        assert!(told.iter().all(|datagram| datagram[0] != b'T'), "a shared content was withdrawn");
    }

    #[test]
    fn a_silent_index_is_called_lost_and_new_keys_are_fetched() {
        let (mut link, _, mut now) = standing();
        now = now + Duration::from_secs(30);
        let mut seen = vec![];
        for _ in 0..100 {
            link.tick(now);
            seen.extend(outputs(&mut link).into_iter().filter(|o| !matches!(o, Output::Send(_))));
            now = now + 100 * MS;
        }
        assert_eq!(seen, [Output::IndexLost, Output::NeedSession]);
        link.on_session_failed(now);
        let again = link.next_deadline().unwrap().max(now + SESSION_WAITS.0 * 2);
        link.tick(again);
        assert!(outputs(&mut link).contains(&Output::NeedSession));
    }

    #[test]
    fn questions_without_keys_fail_soon_when_the_desk_cannot_be_reached() {
        let (mut link, now) = (Link::new(5), Moment::from_micros(7));
        let id = link.ask(now, list());
        link.tick(now);
        link.on_session_failed(now + KEYLESS_PATIENCE);
        let failed = Output::Answered { id, result: Err(LinkError::NoAnswer) };
        assert!(outputs(&mut link).contains(&failed));
    }

    #[test]
    fn a_gap_in_the_notices_asks_for_what_came_since() {
        let (mut link, mut index, now) = standing();
        link.watch(now, "*".into());
        link.tick(now);
        let w = sent(&mut link);
        let id = index.read(&w[0]).1;
        let watching = Watching { lease_s: 90, sequence: 40, missed: false };
        link.on_datagram(now, &mut index.reply(id, &Reply::Ack(Ack::Watching(watching))));
        assert_eq!(outputs(&mut link), [Output::Relist], "list once the watch stands, not before");
        let row = Row {
            key: RowKey { name: None, id: ContentId::file([1; 32]) },
            size: 1,
            hosts: 1,
            complete: 1,
            version: None,
            publisher: None,
        };
        let notice = |before, after| Notice { before, after, rows: vec![row.clone()] };
        let mut tell = |link: &mut Link, n: Notice| {
            let mut datagram = index.seal(b'N', &n.encode());
            link.on_datagram(now, &mut datagram);
            outputs(link)
        };
        let changes = Output::Changes { rows: vec![row.clone()] };
        assert_eq!(tell(&mut link, notice(40, 41)), [changes]);
        assert_eq!(tell(&mut link, notice(40, 41)), [], "told twice, taken once");
        let asked = tell(&mut link, notice(43, 44));
        let [Output::Send(again)] = &asked[..] else { panic!("{asked:?}") };
        let (_, _, request) = index.read(again);
        assert_eq!(request, Request::Watch(Watch { glob: "*".into(), since: 41, stop: false }));
    }

    #[test]
    fn arbitrary_datagrams_are_ignored() {
        let (mut link, mut index, now) = standing();
        let id = link.ask(now, list());
        let reply = Reply::Ack(Ack::Deregistered);
        let good = index.reply(id, &reply);
        let _ = outputs(&mut link);
        for at in 0..good.len() {
            let mut bent = good.clone();
            bent[at] ^= 0x10;
            link.on_datagram(now, &mut bent);
            assert_eq!(outputs(&mut link), [], "byte {at}");
        }
    }
}
