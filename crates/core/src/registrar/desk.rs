//! Owns the desk: joining, session keys, invitations and removal, for members over TLS and for the
//! index's own operator alike. Never speaks UDP.

use crate::id::{MemberNumber, PeerId};
use crate::time::{Moment, WallTime};
use crate::wire::desk::{
    Answer, Ask, DeskCode, DeskRefusal, InviteTerms, MAX_MEMBERS, Member as ListedMember, Removal,
    Session,
};

use super::members::{Joined, Member, refuse};
use super::{Change, Output, Registrar, Ticket};
use crate::trust::Role;

/// Who is at the desk, as TLS proved it.
#[derive(Clone, Copy)]
pub struct Caller {
    /// Its key.
    pub peer: PeerId,
    /// The connection's exporter secret: what a join is bound to.
    pub exporter: [u8; 32],
}

/// An invitation that was made; the caller writes its text form.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Invited {
    /// Its secret.
    pub secret: [u8; 16],
    /// Its terms.
    pub terms: InviteTerms,
}

impl Registrar {
    /// Somebody asks at the desk. There is one output for the ticket: an answer, or silence.
    pub fn on_ask(&mut self, now: Moment, wall: WallTime, caller: Caller, ask: Ask, ticket: Ticket) {
        let mut changes = vec![];
        let durable = matches!(ask, Ask::Join(_) | Ask::Invite(_) | Ask::Remove(_));
        let answer = match ask {
            Ask::Join(join) => {
                match self.roster.join(caller.peer, &caller.exporter, &join, wall, &mut changes) {
                    Joined::Ignored => None,
                    Joined::Refused(refusal) => Some(Answer::Refused(refusal)),
                    Joined::Welcome(number) => self
                        .roster
                        .certify(&self.key, number, None, wall, &mut changes)
                        .map(|certificate| Answer::Welcome(Box::new(certificate))),
                }
            }
            ask => self.answer_member(now, wall, caller.peer, ask, &mut changes),
        };
        self.save(changes);
        self.outputs.push_back(match answer {
            Some(answer) => Output::Answer { ticket, answer, durable },
            None => Output::Ignore { ticket },
        });
    }

    /// The operator of the index makes an invitation. Its rows are among the outputs: print it only
    /// when they are on disk.
    pub fn make_invitation(
        &mut self,
        _now: Moment,
        wall: WallTime,
        terms: InviteTerms,
    ) -> Result<Invited, DeskRefusal> {
        let secret = self.secrets.draw();
        let mut changes = vec![];
        let made = self.roster.invite(secret, terms, wall, &mut changes);
        self.save(changes);
        made.map(|()| Invited { secret, terms })
    }

    /// All members, by number.
    pub fn members(&self, now: Moment) -> Vec<ListedMember> {
        self.roster.present().map(|member| self.listed(member, now)).collect()
    }

    /// Removes members; says how many. They are out with their next datagram, what they hosted is
    /// forgotten at once, and the revocation list has a new version.
    pub fn remove(
        &mut self,
        now: Moment,
        wall: WallTime,
        removal: &Removal,
    ) -> Result<u32, DeskRefusal> {
        let mut changes = vec![];
        let going = self.roster.remove(&self.key, removal, wall, &mut changes);
        self.save(changes);
        let going = going?;
        for member in &going {
            self.watchers.remove(*member);
            self.evict(*member);
        }
        self.watchers.note(now, self.catalog.sequence());
        Ok(going.len() as u32)
    }

    /// Answers one who must be a member; `None` to anybody else.
    fn answer_member(
        &mut self,
        now: Moment,
        wall: WallTime,
        peer: PeerId,
        ask: Ask,
        changes: &mut Vec<Change>,
    ) -> Option<Answer> {
        let member = self.roster.member_with(peer)?;
        let (number, role) = (member.number, member.role);
        if member.removed.is_some() {
            let text = "this machine was removed from the network";
            return Some(Answer::Refused(refuse(DeskCode::Removed, text)));
        }
        if role != Role::Admin && !matches!(ask, Ask::Session { .. }) {
            let text = "only an admin may do this: ask the index's operator";
            return Some(Answer::Refused(refuse(DeskCode::NotAllowed, text)));
        }
        let answer = match ask {
            Ask::Join(_) => return None, // answered before anybody was asked to be a member
            Ask::Session { label, revocations } => {
                let session = self.open_session(wall, number, &label, revocations, changes)?;
                Ok(Answer::Session(Box::new(session)))
            }
            Ask::Invite(terms) => self
                .make_invitation(now, wall, terms)
                .map(|Invited { secret, terms }| Answer::Invited { secret, terms }),
            Ask::Members => {
                let mut members = self.members(now);
                members.truncate(MAX_MEMBERS); // the rest is seen at the index itself
                Ok(Answer::Members(members))
            }
            Ask::Remove(removal) => self.remove(now, wall, &removal).map(Answer::Removed),
        };
        Some(answer.unwrap_or_else(Answer::Refused))
    }

    fn open_session(
        &mut self,
        wall: WallTime,
        number: MemberNumber,
        label: &str,
        revocations: u32,
        changes: &mut Vec<Change>,
    ) -> Option<Session> {
        let certificate =
            self.roster.certify(&self.key, number, Some(label), wall, changes)?;
        let (epoch, salt) = (self.epochs.current(), u64::from_be_bytes(self.secrets.draw()));
        let keys = self.epochs.session(epoch, self.network, number, salt)?;
        let list = self.roster.revocations();
        Some(Session {
            member: number,
            epoch,
            salt,
            key_to_index: keys.to_index,
            key_from_index: keys.from_index,
            heartbeat_s: self.settings.heartbeat.as_secs().clamp(1, u64::from(u16::MAX)) as u16,
            valid_s: u32::try_from(self.settings.session.as_secs()).unwrap_or(u32::MAX),
            certificate,
            revocations: (list.version != revocations).then(|| list.clone()),
        })
    }

    fn listed(&self, member: &Member, now: Moment) -> ListedMember {
        let seat = self.seats.get(member.number.0 as usize).and_then(|seat| seat.as_deref());
        let heard = seat.and_then(|seat| seat.heard);
        ListedMember {
            peer: member.peer,
            number: member.number,
            role: member.role,
            label: member.label.clone(),
            joined: member.joined,
            invitation: member.invitation,
            silent_s: heard.map(|h| u32::try_from(now.since(h).as_secs()).unwrap_or(u32::MAX)),
        }
    }
}
