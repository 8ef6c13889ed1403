//! Owns the limits of an index that its operator may set, and what they are called in a file. Never
//! applies one: the registrar does.

use potluck_core::registrar::Settings as Terms;

/// How much an index takes. Whatever is over a limit is refused, and what is there stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexLimits {
    /// Machines that ever joined, removed ones included.
    pub members: usize,
    /// Contents known, hosted or named.
    pub contents: usize,
    /// Registrations (a content at a host) in all.
    pub registrations: usize,
    /// Registrations of one member.
    pub registrations_a_member: usize,
    /// Names.
    pub names: usize,
    /// Versions of all names together.
    pub versions: usize,
    /// Versions that one publisher signed.
    pub versions_a_publisher: usize,
    /// Members that watch the listing at once.
    pub watchers: usize,
    /// Sessions of one member whose replay windows are kept.
    pub sessions_a_member: usize,
    /// Requests a second of one member.
    pub requests_a_second: usize,
    /// Bytes of memory, as the index reckons them, from which on nothing more is taken that stays.
    pub memory: usize,
}

impl Default for IndexLimits {
    fn default() -> Self {
        let terms = Terms::default();
        let catalog = terms.limits;
        Self {
            members: terms.members,
            contents: catalog.contents,
            registrations: catalog.registrations,
            registrations_a_member: catalog.registrations_a_member,
            names: catalog.names,
            versions: catalog.records,
            versions_a_publisher: catalog.records_a_publisher,
            watchers: terms.watchers,
            sessions_a_member: terms.sessions_a_member,
            requests_a_second: terms.requests_a_second as usize,
            memory: terms.memory,
        }
    }
}

impl IndexLimits {
    /// What the limits are called.
    pub const NAMES: [&str; 11] = [
        "members",
        "contents",
        "registrations",
        "registrations_a_member",
        "names",
        "versions",
        "versions_a_publisher",
        "watchers",
        "sessions_a_member",
        "requests_a_second",
        "memory",
    ];

    /// The limit of this name.
    pub fn named(&mut self, name: &str) -> Option<&mut usize> {
        Some(match name {
            "members" => &mut self.members,
            "contents" => &mut self.contents,
            "registrations" => &mut self.registrations,
            "registrations_a_member" => &mut self.registrations_a_member,
            "names" => &mut self.names,
            "versions" => &mut self.versions,
            "versions_a_publisher" => &mut self.versions_a_publisher,
            "watchers" => &mut self.watchers,
            "sessions_a_member" => &mut self.sessions_a_member,
            "requests_a_second" => &mut self.requests_a_second,
            "memory" => &mut self.memory,
            _ => return None,
        })
    }

    /// `terms` with these limits. A member may ask twice as much at once as in a second.
    pub(super) fn terms(&self, terms: Terms) -> Terms {
        let a_second = u32::try_from(self.requests_a_second).unwrap_or(u32::MAX);
        Terms {
            limits: potluck_core::catalog::Limits {
                contents: self.contents,
                registrations: self.registrations,
                registrations_a_member: self.registrations_a_member,
                names: self.names,
                records: self.versions,
                records_a_publisher: self.versions_a_publisher,
                ..terms.limits
            },
            members: self.members,
            watchers: self.watchers,
            memory: self.memory,
            sessions_a_member: self.sessions_a_member,
            requests_a_second: a_second,
            burst: a_second.saturating_mul(2),
            ..terms
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_unless_told_otherwise_are_those_of_the_registrar() {
        let terms = IndexLimits::default().terms(Terms::default());
        assert_eq!(format!("{terms:?}"), format!("{:?}", Terms::default()));
    }

    #[test]
    fn every_name_is_a_limit_of_its_own() {
        let mut limits = IndexLimits::default();
        for (nth, name) in IndexLimits::NAMES.iter().enumerate() {
            *limits.named(name).unwrap() = nth;
        }
        let all = IndexLimits::NAMES.map(|name| *limits.named(name).unwrap());
        assert!(all.into_iter().eq(0..IndexLimits::NAMES.len()));
        assert_eq!(limits.named("heartbeat"), None);
    }
}
