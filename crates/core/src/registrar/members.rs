//! Owns who is a member: invitations, members, removal and the revocation list, and the secrets
//! session keys come from. Never sees a datagram.

use std::collections::{BTreeMap, BTreeSet};

use zeroize::Zeroize;

use crate::id::{MemberNumber, NetworkId, PeerId};
use crate::seal::{EpochSecret, SessionKeys};
use crate::time::{Duration, Moment, WallTime};
use crate::trust::{
    CERTIFICATE_LIFE, CLOCK_SKEW, Certificate, MAX_REVOKED, MachineKey, RevocationList, Role,
    clean_label, invitation_id, join_tag, same_tag,
};
use crate::wire::desk::{DeskCode, DeskRefusal, InviteTerms, Join, Removal};

use super::saved::{self, Change};

/// How long an epoch's secret makes new sessions; the one before is kept as long again.
pub(super) const EPOCH: Duration = Duration::from_secs(24 * 3600);
/// Members whose session comes from a secret this close to its end are told to fetch another.
const ENDING: Duration = Duration::from_secs(3600);
/// Machines that may join by one invitation.
const MAX_USES: u32 = 100_000;
/// The longest an invitation may hold.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);
/// So many removed machines stay on the list whatever the date: a clock that is years ahead for a moment
/// must let nobody in again.
const ALWAYS_REVOKED: usize = 1_000;
/// An invitation that no longer works is told so for this long, then it is unknown.
const REMEMBERED: Duration = Duration::from_secs(30 * 24 * 3600);

/// A member, or a machine that was one: its number is never given again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its key.
    pub peer: PeerId,
    /// Its number, from 1.
    pub number: MemberNumber,
    /// What it may do.
    pub role: Role,
    /// What it calls itself.
    pub label: String,
    /// When it joined.
    pub joined: WallTime,
    /// The invitation it joined by.
    pub invitation: [u8; 8],
    /// When it was removed, where it was.
    pub removed: Option<WallTime>,
}

/// An invitation, as the index keeps it.
#[derive(Clone)]
pub(super) struct Invited {
    pub(super) secret: [u8; 16],
    pub(super) terms: InviteTerms,
    pub(super) used: u32,
    pub(super) withdrawn: bool,
}

impl Drop for Invited {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

/// Secrets nobody can foretell: BLAKE3 under a key that is replaced with every one drawn, so what
/// was drawn before cannot be found again in memory.
pub(super) struct Secrets([u8; 32]);

impl Secrets {
    pub(super) const fn new(seed: [u8; 32]) -> Self {
        Self(seed)
    }

    pub(super) fn draw<const N: usize>(&mut self) -> [u8; N] {
        let secret = blake3::keyed_hash(&self.0, b"secret");
        self.0 = *blake3::keyed_hash(&self.0, b"next").as_bytes();
        std::array::from_fn(|i| secret.as_bytes()[i])
    }
}

impl Drop for Secrets {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// A day's secret.
struct Epoch {
    number: u16,
    secret: EpochSecret,
    made: WallTime,
}

/// The secrets of today and of yesterday.
pub(super) struct Epochs {
    current: Epoch,
    previous: Option<Epoch>,
    /// When a new one takes the place of `current`, and `previous` is erased.
    turns: Moment,
}

impl Epochs {
    /// Goes on with what was saved; what is too old makes way at once.
    pub(super) fn new(
        mut saved: Vec<(u16, [u8; 32], WallTime)>,
        secrets: &mut Secrets,
        now: Moment,
        wall: WallTime,
        changes: &mut Vec<Change>,
    ) -> Self {
        saved.sort_by_key(|(number, _, made)| (*made, *number));
        let age = |made: WallTime| Duration::from_secs(wall.0.saturating_sub(made.0));
        let gone = |made: WallTime| age(made) >= 2 * EPOCH;
        while saved.len() > 2 || saved.first().is_some_and(|(_, _, made)| gone(*made)) {
            let (number, mut secret, _) = saved.remove(0);
            secret.zeroize();
            changes.push(saved::epoch(number, None));
        }
        let mut epochs = saved.into_iter().rev();
        let mut next = || {
            let (number, secret, made) = epochs.next()?;
            Some(Epoch { number, secret: EpochSecret(secret), made })
        };
        match next() {
            Some(current) => {
                let turns = now + EPOCH.saturating_sub(age(current.made));
                Self { current, previous: next(), turns }
            }
            None => {
                let current = fresh(1, secrets, wall, changes);
                Self { current, previous: None, turns: now + EPOCH }
            }
        }
    }

    /// When [`Epochs::turn`] is due.
    pub(super) const fn turns(&self) -> Moment {
        self.turns
    }

    /// Begins a new epoch where it is time; says whether it was.
    pub(super) fn turn(
        &mut self,
        secrets: &mut Secrets,
        now: Moment,
        wall: WallTime,
        changes: &mut Vec<Change>,
    ) -> bool {
        if now < self.turns {
            return false;
        }
        let next = fresh(self.current.number.wrapping_add(1), secrets, wall, changes);
        let last = std::mem::replace(&mut self.current, next);
        if let Some(erased) = self.previous.replace(last) {
            changes.push(saved::epoch(erased.number, None));
        }
        self.turns = now + EPOCH;
        true
    }

    /// The keys of a session of `epoch`; `None` where its secret is unknown or erased.
    pub(super) fn session(
        &self,
        epoch: u16,
        network: NetworkId,
        member: MemberNumber,
        salt: u64,
    ) -> Option<SessionKeys> {
        self.secret(epoch).map(|secret| secret.session(network, member, salt))
    }

    /// Whether there is a secret for `epoch`.
    pub(super) fn knows(&self, epoch: u16) -> bool {
        self.secret(epoch).is_some()
    }

    /// Whether sessions of `epoch` will soon be over.
    pub(super) fn ends_soon(&self, epoch: u16, now: Moment) -> bool {
        epoch != self.current.number && self.turns.since(now) < ENDING
    }

    /// The secrets that open datagrams, by number.
    pub(super) fn secrets(&self) -> Vec<(u16, EpochSecret)> {
        self.all().map(|epoch| (epoch.number, epoch.secret.clone())).collect()
    }

    /// Their rows.
    pub(super) fn rows(&self) -> Vec<Change> {
        self.all().map(Epoch::row).collect()
    }

    pub(super) const fn current(&self) -> u16 {
        self.current.number
    }

    fn all(&self) -> impl Iterator<Item = &Epoch> {
        std::iter::once(&self.current).chain(&self.previous)
    }

    fn secret(&self, epoch: u16) -> Option<&EpochSecret> {
        self.all().find(|known| known.number == epoch).map(|known| &known.secret)
    }
}

impl Epoch {
    fn row(&self) -> Change {
        saved::epoch(self.number, Some((&self.secret.0, self.made)))
    }
}

fn fresh(number: u16, secrets: &mut Secrets, wall: WallTime, changes: &mut Vec<Change>) -> Epoch {
    let epoch = Epoch { number, secret: EpochSecret(secrets.draw()), made: wall };
    changes.push(epoch.row());
    epoch
}

/// What comes of a join.
pub(super) enum Joined {
    /// It showed no valid tag: not a byte back.
    Ignored,
    Refused(DeskRefusal),
    Welcome(MemberNumber),
}

/// All members and invitations.
pub(super) struct Roster {
    /// By number; none has number 0.
    members: Vec<Option<Member>>,
    by_peer: BTreeMap<PeerId, MemberNumber>,
    invitations: BTreeMap<[u8; 8], Invited>,
    revocations: RevocationList,
    present: usize,
    most_members: usize,
    most_invitations: usize,
}

impl Roster {
    pub(super) fn new(key: &MachineKey, most_members: usize, most_invitations: usize) -> Self {
        Self {
            members: vec![None],
            by_peer: BTreeMap::new(),
            invitations: BTreeMap::new(),
            revocations: RevocationList::issue(key, 0, BTreeSet::new()),
            present: 0,
            most_members,
            most_invitations,
        }
    }

    pub(super) const fn set_limits(&mut self, most_members: usize, most_invitations: usize) {
        (self.most_members, self.most_invitations) = (most_members, most_invitations);
    }

    pub(super) fn restore_member(&mut self, member: Member) {
        let at = member.number.0 as usize;
        if self.members.len() <= at {
            self.members.resize(at + 1, None);
        }
        self.present += usize::from(member.removed.is_none());
        self.by_peer.insert(member.peer, member.number);
        self.members[at] = Some(member);
    }

    pub(super) fn restore_invitation(&mut self, id: [u8; 8], invited: Invited) {
        self.invitations.insert(id, invited);
    }

    pub(super) fn restore_revocations(&mut self, list: RevocationList) {
        self.revocations = list;
    }

    /// The rows of all invitations.
    pub(super) fn invitation_rows(&self) -> Vec<Change> {
        self.invitations.iter().map(|(id, invited)| saved::invitation(*id, Some(invited))).collect()
    }

    /// All members' numbers are below this.
    pub(super) fn numbers(&self) -> u32 {
        u32::try_from(self.members.len()).unwrap_or(u32::MAX)
    }

    /// The member with this number, removed or not.
    pub(super) fn member(&self, number: MemberNumber) -> Option<&Member> {
        self.members.get(number.0 as usize)?.as_ref()
    }

    /// The member with this key, removed or not.
    pub(super) fn member_with(&self, peer: PeerId) -> Option<&Member> {
        self.member(*self.by_peer.get(&peer)?)
    }

    /// Those that were not removed, by number.
    pub(super) fn present(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().flatten().filter(|member| member.removed.is_none())
    }

    pub(super) const fn count(&self) -> usize {
        self.present
    }

    pub(super) const fn revocations(&self) -> &RevocationList {
        &self.revocations
    }

    /// A member's certificate as of now. Its label follows what it calls itself now.
    pub(super) fn certify(
        &mut self,
        key: &MachineKey,
        number: MemberNumber,
        label: Option<&str>,
        wall: WallTime,
        changes: &mut Vec<Change>,
    ) -> Option<Certificate> {
        let member = self.members.get_mut(number.0 as usize)?.as_mut()?;
        if let Some(label) = label.map(clean_label)
            && label != member.label
        {
            member.label = label;
            changes.push(saved::member(member));
        }
        Some(Certificate::issue(key, member.peer, number, member.role, &member.label, wall))
    }

    /// Makes an invitation with this secret.
    pub(super) fn invite(
        &mut self,
        secret: [u8; 16],
        terms: InviteTerms,
        wall: WallTime,
        changes: &mut Vec<Change>,
    ) -> Result<(), DeskRefusal> {
        if !(1..=MAX_USES).contains(&terms.uses) {
            let text = format!("an invitation is for 1 to {MAX_USES} machines");
            return Err(refuse(DeskCode::BadRequest, text));
        }
        if terms.expires <= wall || terms.expires > wall.plus(LONGEST) {
            return Err(refuse(DeskCode::BadRequest, "an invitation holds for at most a year"));
        }
        let forgotten = |(id, i): (&[u8; 8], &Invited)| {
            (i.terms.expires.plus(REMEMBERED) < wall).then_some(*id)
        };
        let old: Vec<_> = self.invitations.iter().filter_map(forgotten).collect();
        for id in old {
            self.invitations.remove(&id);
            changes.push(saved::invitation(id, None));
        }
        if self.invitations.len() >= self.most_invitations {
            let text = "there are too many invitations: wait until some expire";
            return Err(refuse(DeskCode::Full, text));
        }
        let invited = Invited { secret, terms, used: 0, withdrawn: false };
        let id = invitation_id(&secret);
        changes.push(saved::invitation(id, Some(&invited)));
        self.invitations.insert(id, invited);
        Ok(())
    }

    /// A machine asks to become a member. Whoever does not know an invitation's secret learns
    /// nothing, not even whether there is such an invitation.
    pub(super) fn join(
        &mut self,
        peer: PeerId,
        exporter: &[u8; 32],
        join: &Join,
        wall: WallTime,
        full: bool,
        changes: &mut Vec<Change>,
    ) -> Joined {
        let Some(invited) = self.invitations.get(&join.invitation) else { return Joined::Ignored };
        if !same_tag(&join_tag(&invited.secret, exporter, peer), &join.tag) {
            return Joined::Ignored;
        }
        match self.member_with(peer) {
            Some(Member { removed: Some(_), .. }) => {
                let text = "this machine was removed from the network; a new key is needed to join";
                return Joined::Refused(refuse(DeskCode::Removed, text));
            }
            Some(member) => return Joined::Welcome(member.number),
            None => {}
        }
        if let Err(refusal) = invited.admits(wall) {
            return Joined::Refused(refusal);
        }
        if full || self.by_peer.len() >= self.most_members {
            return Joined::Refused(no_more_members());
        }
        let member = Member {
            peer,
            number: MemberNumber(self.members.len() as u32),
            role: invited.terms.role,
            label: clean_label(&join.label),
            joined: wall,
            invitation: join.invitation,
            removed: None,
        };
        let number = member.number;
        if let Some(invited) = self.invitations.get_mut(&join.invitation) {
            invited.used += 1;
            changes.push(saved::invitation(join.invitation, Some(invited)));
        }
        changes.push(saved::member(&member));
        self.restore_member(member);
        Joined::Welcome(number)
    }

    /// A machine that this index once made a member, and then lost its file, is one again: with its
    /// old number where that is free, and as if it had come by no invitation.
    pub(super) fn take_back(
        &mut self,
        shown: &Certificate,
        wall: WallTime,
        full: bool,
        changes: &mut Vec<Change>,
    ) -> Result<MemberNumber, DeskRefusal> {
        if self.revocations.peers.contains(&shown.peer) {
            return Err(refuse(DeskCode::Removed, "this machine was removed from the network"));
        }
        if full || self.by_peer.len() >= self.most_members {
            return Err(no_more_members());
        }
        let at = shown.member.0 as usize;
        let free = (1..=self.most_members).contains(&at)
            && self.members.get(at).is_none_or(Option::is_none);
        let number = if free { shown.member } else { MemberNumber(self.members.len() as u32) };
        let member = Member {
            peer: shown.peer,
            number,
            role: shown.role,
            label: clean_label(&shown.label),
            joined: wall,
            invitation: [0; 8],
            removed: None,
        };
        changes.push(saved::member(&member));
        self.restore_member(member);
        Ok(number)
    }

    /// Removes members; says which. Their certificates are revoked until the last has expired.
    pub(super) fn remove(
        &mut self,
        key: &MachineKey,
        removal: &Removal,
        wall: WallTime,
        changes: &mut Vec<Change>,
    ) -> Result<Vec<MemberNumber>, DeskRefusal> {
        let going: Vec<MemberNumber> = match removal {
            Removal::Peer(peer) => match self.member_with(*peer) {
                None => return Err(refuse(DeskCode::NotFound, "no member has this id")),
                Some(member) => Some(member.number).filter(|_| member.removed.is_none()),
            }
            .into_iter()
            .collect(),
            Removal::Invitation(id) => {
                let by_it = |m: &&Member| m.invitation == *id;
                let going: Vec<_> = self.present().filter(by_it).map(|m| m.number).collect();
                if !self.invitations.contains_key(id) && going.is_empty() {
                    return Err(refuse(DeskCode::NotFound, "there is no such invitation"));
                }
                going
            }
        };
        let mut revoked = self.still_revoked(wall);
        if revoked.len() + going.len() > MAX_REVOKED {
            let text = format!("more than {MAX_REVOKED} removals in a day: wait a day");
            return Err(refuse(DeskCode::Full, text));
        }
        if let Removal::Invitation(id) = removal
            && let Some(invited) = self.invitations.get_mut(id)
        {
            invited.withdrawn = true;
            changes.push(saved::invitation(*id, Some(invited)));
        }
        for number in &going {
            if let Some(member) = &mut self.members[number.0 as usize] {
                member.removed = Some(wall);
                revoked.insert(member.peer);
                changes.push(saved::member(member));
                self.present -= 1;
            }
        }
        if !going.is_empty() {
            // No lower than the date, so that a list is newer than any before the file was lost.
            let date = u32::try_from(wall.0).unwrap_or(u32::MAX);
            let version = self.revocations.version.saturating_add(1).max(date);
            self.revocations = RevocationList::issue(key, version, revoked);
            changes.push(saved::revocations(&self.revocations));
        }
        Ok(going)
    }

    /// Revoked machines: all of them while they are few, then without those whose last certificate
    /// must have expired, the earliest removed first.
    fn still_revoked(&self, wall: WallTime) -> BTreeSet<PeerId> {
        let life = CERTIFICATE_LIFE + 2 * CLOCK_SKEW;
        let mut revoked = self.revocations.peers.clone();
        let removed = |peer: &PeerId| self.member_with(*peer).and_then(|member| member.removed);
        let over = revoked.iter().filter_map(|peer| Some((removed(peer)?, *peer)));
        let mut over: Vec<_> = over.filter(|(removed, _)| removed.plus(life) < wall).collect();
        over.sort_unstable();
        let most = revoked.len().saturating_sub(ALWAYS_REVOKED);
        over.iter().take(most).for_each(|(_, peer)| {
            revoked.remove(peer);
        });
        revoked
    }

    pub(super) fn check(&self) {
        let present = self.present().count();
        assert_eq!(present, self.present, "members are miscounted");
        for (at, member) in self.members.iter().enumerate() {
            if let Some(member) = member {
                assert_eq!(member.number.0 as usize, at, "a member has another's number");
                assert_eq!(self.by_peer.get(&member.peer), Some(&member.number));
            }
        }
        for invited in self.invitations.values() {
            assert!(invited.used <= invited.terms.uses, "an invitation was used too often");
        }
    }
}

impl Invited {
    fn admits(&self, wall: WallTime) -> Result<(), DeskRefusal> {
        if self.withdrawn {
            return Err(refuse(
                DeskCode::Withdrawn,
                "this invitation was withdrawn: ask for another",
            ));
        }
        if wall > self.terms.expires {
            return Err(refuse(DeskCode::Expired, "this invitation has expired: ask for another"));
        }
        if self.used >= self.terms.uses {
            let uses = self.terms.uses;
            let text =
                format!("this invitation is used up: it was for {uses}, and so many have joined");
            return Err(refuse(DeskCode::UsedUp, text));
        }
        Ok(())
    }
}

fn no_more_members() -> DeskRefusal {
    refuse(DeskCode::Full, "the network has as many members as it may")
}

/// A refusal at the desk.
pub(super) fn refuse(code: DeskCode, text: impl Into<String>) -> DeskRefusal {
    DeskRefusal { code, text: text.into() }
}
