//! Owns a world's desk: machines that fetch a session there, and join where they are strangers.

use crate::registrar::{self, Caller, Ticket};
use crate::time::Duration;
use crate::trust::{Distrust, invitation_id, join_tag};
use crate::wire::desk::{Answer, Ask, DeskCode, InviteTerms, Join};

use super::{Event, FromDesk, HEARTBEAT, IndexWorld, News, save, throw};

impl IndexWorld {
    pub(super) fn fetch_session(&mut self, at: usize) {
        let machine = &mut self.machines[at];
        if !std::mem::replace(&mut machine.fetching, true) {
            let life = machine.life;
            let wait = Duration::from_millis(2 + throw(&mut self.dice, 80) as u64);
            self.at(wait, Event::AtDesk { machine: at, life });
        }
    }

    /// A machine is at the desk: for a session, and before that to join where it is a stranger.
    pub(super) fn at_desk(&mut self, at: usize, life: u32) {
        let (now, wall) = (self.now, self.wall());
        let machine = &mut self.machines[at];
        let caller = Caller { peer: machine.key.peer(), exporter: [at as u8; 32] };
        let mut answer = FromDesk::Nothing;
        if let Some(index) = self.index.as_mut().filter(|_| !machine.cut) {
            let known = index.members(now).iter().any(|member| member.peer == caller.peer);
            let certificate = machine.certificate.clone();
            if !known && !machine.removed && certificate.is_none() {
                let role = machine.role;
                let terms = InviteTerms { role, uses: 1, expires: wall.plus(HEARTBEAT) };
                let invited = index.make_invitation(now, wall, terms).expect("it is in order");
                let join = Join {
                    invitation: invitation_id(&invited.secret),
                    tag: join_tag(&invited.secret, &caller.exporter, caller.peer),
                    label: format!("machine {at}"),
                };
                index.on_ask(now, wall, caller, Ask::Join(join), Ticket(0));
            }
            let label = format!("machine {at}");
            let revocations = machine.revocations.as_ref().map_or(0, |list| list.version);
            let shows = certificate.is_some();
            let ask = Ask::Session { label, revocations, certificate };
            index.on_ask(now, wall, caller, ask, Ticket(1));
            while let Some(output) = index.poll_output() {
                match output {
                    registrar::Output::Answer { answer: Answer::Session(given), .. } => {
                        self.story.taken_back += u64::from(!known && shows);
                        answer = FromDesk::Session(given);
                    }
                    registrar::Output::Answer { answer: Answer::Welcome(_), durable, .. } => {
                        assert!(durable);
                    }
                    registrar::Output::Answer { answer: Answer::Refused(refusal), .. } => {
                        assert!(machine.removed, "{refusal}");
                        if refusal.code == DeskCode::Removed {
                            answer = FromDesk::Removed;
                        }
                    }
                    registrar::Output::Answer { .. } => panic!("another answer"),
                    registrar::Output::Ignore { .. } if machine.removed => {}
                    registrar::Output::Ignore { .. } => {
                        // The index lost its file, and the certificate is of another time: a person
                        // invites the machine anew.
                        let skewed = machine.certificate.take().is_some_and(|shown| {
                            shown.check(index.network(), caller.peer, wall).is_err()
                        });
                        assert!(skewed, "machine {at} is no stranger");
                        self.story.invited_anew += 1;
                    }
                    registrar::Output::Save(change) => save(&mut self.rows, change),
                    // Nothing is lost by that: whoever watches is told again.
                    registrar::Output::Send { .. } => {}
                }
            }
        }
        self.at(Duration::from_millis(1), Event::FromDesk { machine: at, life, answer });
    }

    /// Takes over a session, where its certificate is good by the machine's own clock.
    pub(super) fn adopt(&mut self, at: usize, answer: FromDesk) {
        let (now, network) = (self.now, self.key().network());
        let wall = self.wall_of(at);
        let machine = &mut self.machines[at];
        machine.fetching = false;
        let Some(link) = &mut machine.link else { return };
        let mut newer = false;
        match answer {
            FromDesk::Session(session) => {
                match session.certificate.check(network, machine.key.peer(), wall) {
                    Ok(()) => {
                        machine.certificate = Some(session.certificate.clone());
                        if let Some(list) = &session.revocations {
                            assert_eq!(list.check(network), Ok(()));
                            newer = true;
                            machine.revocations = Some(list.clone());
                        }
                        link.on_session(now, *session);
                    }
                    Err(distrust) => {
                        assert!(
                            matches!(distrust, Distrust::Expired | Distrust::NotYet),
                            "{distrust}"
                        );
                        self.story.distrusted += 1;
                        link.on_session_failed(now);
                    }
                }
            }
            FromDesk::Removed => {
                link.on_removed(now);
                self.tell_whole(News::Reachable { machine: at, yes: false });
            }
            FromDesk::Nothing => link.on_session_failed(now),
        }
        self.carry_link(at);
        if newer {
            self.tell_whole(News::Revocations { machine: at });
        }
    }
}
