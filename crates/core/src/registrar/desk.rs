//! Owns the desk: joining, session keys, invitations and removal, for members over TLS and for the
//! index's own operator alike. Never speaks UDP.

use crate::id::{MemberNumber, PeerId};
use crate::time::{Moment, WallTime};
use crate::trust::{Certificate, Role};
use crate::wire::desk::{
    Answer, Ask, DeskCode, DeskRefusal, InviteTerms, Join, MAX_MEMBERS, Member as ListedMember,
    Removal, Session,
};

use super::members::{Joined, Member, refuse};
use super::{Output, Registrar, Ticket};

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
    pub fn on_ask(
        &mut self,
        now: Moment,
        wall: WallTime,
        caller: Caller,
        ask: Ask,
        ticket: Ticket,
    ) {
        let durable = weighs(&ask);
        let answer = match ask {
            Ask::Join(join) => self.join(wall, caller, &join),
            Ask::Session { label, revocations, certificate } => {
                let shown = certificate.as_ref();
                self.open_session(wall, caller.peer, &label, revocations, shown)
            }
            ask => self.answer_member(now, wall, caller.peer, ask),
        };
        self.outputs.push_back(match answer {
            Some(answer) => Output::Answer { ticket, answer, durable },
            None => Output::Ignore { ticket },
        });
    }

    /// The operator asks, on the index's own machine: as an admin would. There is one answer.
    pub fn on_operator(&mut self, now: Moment, wall: WallTime, ask: Ask, ticket: Ticket) {
        let durable = weighs(&ask);
        let answer = self.answer_admin(now, wall, ask);
        self.outputs.push_back(Output::Answer { ticket, answer, durable });
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

    fn join(&mut self, wall: WallTime, caller: Caller, join: &Join) -> Option<Answer> {
        let (mut changes, full) = (vec![], self.is_full());
        let joined =
            self.roster.join(caller.peer, &caller.exporter, join, wall, full, &mut changes);
        self.save(changes);
        match joined {
            Joined::Ignored => None,
            Joined::Refused(refusal) => Some(Answer::Refused(refusal)),
            Joined::Welcome(number) => {
                self.news += 1;
                let certificate = self.certify(number, None, wall)?;
                Some(Answer::Welcome(Box::new(certificate)))
            }
        }
    }

    /// Answers one who must be a member, and an admin; `None` to anybody else.
    fn answer_member(
        &mut self,
        now: Moment,
        wall: WallTime,
        peer: PeerId,
        ask: Ask,
    ) -> Option<Answer> {
        let member = self.roster.member_with(peer)?;
        if member.removed.is_some() {
            return Some(removed());
        }
        if member.role != Role::Admin {
            let text = "only an admin may do this: ask the index's operator";
            return Some(Answer::Refused(refuse(DeskCode::NotAllowed, text)));
        }
        Some(self.answer_admin(now, wall, ask))
    }

    fn answer_admin(&mut self, now: Moment, wall: WallTime, ask: Ask) -> Answer {
        let answer = match ask {
            Ask::Join(_) | Ask::Session { .. } => {
                Err(refuse(DeskCode::BadRequest, "this is asked at the desk, by a machine"))
            }
            Ask::Invite(terms) => self
                .make_invitation(now, wall, terms)
                .map(|Invited { secret, terms }| Answer::Invited { secret, terms }),
            Ask::Members => {
                let mut members = self.members(now);
                members.truncate(MAX_MEMBERS); // as many as an answer holds
                Ok(Answer::Members(members))
            }
            Ask::Remove(removal) => self.remove(now, wall, &removal).map(Answer::Removed),
        };
        answer.unwrap_or_else(Answer::Refused)
    }

    /// A member fetches keys and a fresh certificate. A machine that is not known but shows a
    /// certificate that this index once signed is taken back: the index has lost its file.
    fn open_session(
        &mut self,
        wall: WallTime,
        peer: PeerId,
        label: &str,
        revocations: u32,
        shown: Option<&Certificate>,
    ) -> Option<Answer> {
        let number = match self.roster.member_with(peer) {
            Some(Member { removed: Some(_), .. }) => return Some(removed()),
            Some(member) => member.number,
            None => {
                let shown = shown.filter(|c| c.check(self.network, peer, wall).is_ok())?;
                let (mut changes, full) = (vec![], self.is_full());
                let number = self.roster.take_back(shown, wall, full, &mut changes);
                self.save(changes);
                self.news += 1;
                match number {
                    Ok(number) => number,
                    Err(refusal) => return Some(Answer::Refused(refusal)),
                }
            }
        };
        let certificate = self.certify(number, Some(label), wall)?;
        let (epoch, salt) = (self.epochs.current(), u64::from_be_bytes(self.secrets.draw()));
        let keys = self.epochs.session(epoch, self.network, number, salt)?;
        let list = self.roster.revocations();
        Some(Answer::Session(Box::new(Session {
            member: number,
            epoch,
            salt,
            keys,
            heartbeat_s: self.settings.heartbeat_s.max(1),
            valid_s: u32::try_from(self.settings.session.as_secs()).unwrap_or(u32::MAX),
            certificate,
            revocations: (list.version > revocations).then(|| list.clone()),
        })))
    }

    fn certify(
        &mut self,
        number: MemberNumber,
        label: Option<&str>,
        wall: WallTime,
    ) -> Option<Certificate> {
        let mut changes = vec![];
        let certificate = self.roster.certify(&self.key, number, label, wall, &mut changes);
        self.save(changes);
        certificate
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

/// Whether an answer may be given only once what it says is on disk.
const fn weighs(ask: &Ask) -> bool {
    matches!(ask, Ask::Join(_) | Ask::Invite(_) | Ask::Remove(_))
}

fn removed() -> Answer {
    Answer::Refused(refuse(DeskCode::Removed, "this machine was removed from the network"))
}
