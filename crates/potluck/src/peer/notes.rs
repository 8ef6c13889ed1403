//! Owns what a peer keeps in its store beside contents: its membership, the names of contents, the
//! highest version seen of each name. Never kept anywhere else; drawn here, all numbers big-endian.
//!
//! | key | value |
//! |---|---|
//! | `network` | network key 32 · count u8 · so many (length u8, `host:port`) · certificate (length u16) · revocation list |
//! | `founded` | `host:port` listened on, as text: this peer also runs the index |
//! | `name/ID` | 1 if published here, 0 if fetched · a name record |
//! | `seen/NETWORK/NAME` | publisher 32 · version u32 |
//! | `paused/ID` | empty |
//! | `limits` | bytes a second sent u64 · received u64, 0 is no limit |

use potluck_core::id::{ContentId, Name, NetworkId, PeerId, Version};
use potluck_core::limit::Limit;
use potluck_core::trust::{Certificate, NameRecord, RevocationList};
use potluck_core::wire::bytes::{Malformed, Reader, Writer};

use crate::error::Result;
use crate::store::Store;

/// What a member remembers of its network.
#[derive(Clone, Debug)]
pub(crate) struct Membership {
    pub(crate) network: NetworkId,
    pub(crate) index: Vec<String>,
    pub(crate) certificate: Certificate,
    pub(crate) revocations: RevocationList,
}

impl Membership {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put(&self.network.0);
        out.u8(self.index.len().min(255) as u8);
        for address in self.index.iter().take(255) {
            out.text8(address);
        }
        out.bytes16(&self.certificate.encode());
        self.revocations.write(&mut out);
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        let network = NetworkId(r.array()?);
        let count = r.u8()?;
        let index = (0..count).map(|_| r.text8().map(str::to_owned)).collect::<Result<_, _>>()?;
        let certificate = Certificate::decode(r.bytes16()?)?;
        let revocations = RevocationList::read(&mut r)?;
        r.end()?;
        Ok(Self { network, index, certificate, revocations })
    }
}

/// A name a content is known by here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KnownName {
    pub(crate) published_here: bool,
    pub(crate) record: NameRecord,
}

/// The typed face of the store's notes.
pub(crate) struct Notes<'a>(pub(crate) &'a Store);

impl Notes<'_> {
    pub(crate) fn membership(&self) -> Result<Option<Membership>> {
        self.read("network", Membership::decode)
    }

    pub(crate) fn set_membership(&self, membership: Option<&Membership>) -> Result<()> {
        self.0.set_note("network", membership.map(Membership::encode).as_deref())
    }

    pub(crate) fn founded(&self) -> Result<Option<String>> {
        self.read("founded", |bytes| {
            String::from_utf8(bytes.to_vec()).map_err(|_| Malformed("not text"))
        })
    }

    pub(crate) fn set_founded(&self, listen: Option<&str>) -> Result<()> {
        self.0.set_note("founded", listen.map(str::as_bytes))
    }

    pub(crate) fn name_of(&self, id: ContentId) -> Result<Option<KnownName>> {
        self.read(&format!("name/{id}"), |bytes| {
            let mut r = Reader::new(bytes);
            let published_here = r.u8()? == 1;
            let record = NameRecord::read(&mut r, id)?;
            r.end()?;
            Ok(KnownName { published_here, record })
        })
    }

    pub(crate) fn set_name_of(&self, id: ContentId, name: Option<&KnownName>) -> Result<()> {
        let value = name.map(|name| {
            let mut out = vec![u8::from(name.published_here)];
            name.record.write(&mut out);
            out
        });
        self.0.set_note(&format!("name/{id}"), value.as_deref())
    }

    /// The highest version of `name` this machine has seen, and who published it.
    pub(crate) fn seen(
        &self,
        network: NetworkId,
        name: &Name,
    ) -> Result<Option<(PeerId, Version)>> {
        self.read(&format!("seen/{network}/{name}"), |bytes| {
            let mut r = Reader::new(bytes);
            let seen = (PeerId(r.array()?), r.version()?);
            r.end()?;
            Ok(seen)
        })
    }

    pub(crate) fn set_seen(
        &self,
        network: NetworkId,
        name: &Name,
        by: PeerId,
        version: Version,
    ) -> Result<()> {
        let mut out = by.0.to_vec();
        out.u32(version.0);
        self.0.set_note(&format!("seen/{network}/{name}"), Some(&out))
    }

    /// The keys of all that is kept of one content.
    pub(crate) fn of(id: ContentId) -> Vec<String> {
        vec![format!("name/{id}"), format!("paused/{id}")]
    }

    pub(crate) fn is_paused(&self, id: ContentId) -> Result<bool> {
        Ok(self.0.note(&format!("paused/{id}"))?.is_some())
    }

    pub(crate) fn set_paused(&self, id: ContentId, paused: bool) -> Result<()> {
        self.0.set_note(&format!("paused/{id}"), paused.then_some(&[]))
    }

    /// The limits that were set to stay: of what is sent, and of what is received.
    pub(crate) fn limits(&self) -> Result<Option<(Limit, Limit)>> {
        self.read("limits", |bytes| {
            let mut r = Reader::new(bytes);
            let mut limit = || Limit::new(r.u64()?).map_err(|_| Malformed("a limit too low"));
            let limits = (limit()?, limit()?);
            r.end()?;
            Ok(limits)
        })
    }

    pub(crate) fn set_limits(&self, up: Limit, down: Limit) -> Result<()> {
        let mut out = Vec::new();
        for limit in [up, down] {
            out.u64(limit.bytes_a_second().unwrap_or(0));
        }
        self.0.set_note("limits", Some(&out))
    }

    /// A damaged note counts as none: all of them can be had again, at worst by joining again.
    fn read<T>(
        &self,
        key: &str,
        decode: impl FnOnce(&[u8]) -> Result<T, Malformed>,
    ) -> Result<Option<T>> {
        let Some(bytes) = self.0.note(key)? else { return Ok(None) };
        match decode(&bytes) {
            Ok(value) => Ok(Some(value)),
            Err(e) => {
                tracing::warn!(key, error = %e, "a damaged note is ignored");
                Ok(None)
            }
        }
    }
}
