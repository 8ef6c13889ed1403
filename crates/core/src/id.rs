//! Owns the names of things: a newtype for all that could be mixed up, and how people write them.
//! Never knows what stands behind an id.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use data_encoding::{BASE32_NOPAD, HEXLOWER};
use unicode_normalization::UnicodeNormalization;

/// What a content is; part of its id, since a folder's manifest is bytes like any file's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The id is the BLAKE3 hash of the file: exactly what `b3sum` prints.
    File,
    /// The id is the BLAKE3 hash of the canonical manifest (see `manifest`).
    Folder,
}

/// The id of a content. Written as 64 hexadecimal digits, with a trailing `/` for a folder.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentId {
    /// File or folder.
    pub kind: Kind,
    /// BLAKE3, 32 bytes.
    pub hash: [u8; 32],
}

impl ContentId {
    /// The id of a file whose BLAKE3 hash is `hash`.
    pub const fn file(hash: [u8; 32]) -> Self {
        Self { kind: Kind::File, hash }
    }

    /// The id of a folder whose manifest hashes to `hash`.
    pub const fn folder(hash: [u8; 32]) -> Self {
        Self { kind: Kind::Folder, hash }
    }

    /// The first 12 digits, for tables that people read.
    pub fn short(&self) -> String {
        let mut text = HEXLOWER.encode(&self.hash[..6]);
        if self.kind == Kind::Folder {
            text.push('/');
        }
        text
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.hash))?;
        if self.kind == Kind::Folder { f.write_str("/") } else { Ok(()) }
    }
}

impl fmt::Debug for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

/// A text was not what it should be; says what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(pub &'static str);

impl FromStr for ContentId {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let (digits, kind) = match text.strip_suffix('/') {
            Some(digits) => (digits, Kind::Folder),
            None => (text, Kind::File),
        };
        let hash = HEXLOWER
            .decode(digits.to_ascii_lowercase().as_bytes())
            .ok()
            .and_then(|bytes| <[u8; 32]>::try_from(bytes).ok())
            .ok_or(ParseError(
                "a content id is 64 hexadecimal digits, with a / after a folder's",
            ))?;
        Ok(Self { kind, hash })
    }
}

macro_rules! key {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// The first 8 characters, for tables that people read.
            pub fn short(&self) -> String {
                let mut text = self.to_string();
                text.truncate(8);
                text
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&BASE32_NOPAD.encode(&self.0).to_ascii_lowercase())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.short())
            }
        }

        impl FromStr for $name {
            type Err = ParseError;
            fn from_str(text: &str) -> Result<Self, ParseError> {
                BASE32_NOPAD
                    .decode(text.to_ascii_uppercase().as_bytes())
                    .ok()
                    .and_then(|bytes| bytes.try_into().ok())
                    .map(Self)
                    .ok_or(ParseError(concat!("a ", $what, " id is 52 letters and digits (base 32)")))
            }
        }
    };
}

key!(
    /// A machine: its Ed25519 public key, made there, never leaving it.
    PeerId,
    "machine"
);
key!(
    /// A network: the Ed25519 public key of its index.
    NetworkId,
    "network"
);

/// The small number an index gives a member; what its datagrams are headed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberNumber(pub u32);

/// One question to the index; a repeated one carries the same number and has the same effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// The position of a piece in a content's one piece space, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Piece(pub u32);

/// Which sharing under one name: 1, 2, 3 …
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A name under which content is published.
///
/// 1 to [`Name::MAX_BYTES`] bytes of UTF-8 in NFC; no control or bidirectional-override characters,
/// no `/` or `\`, no blank at either end, not `.` or `..`, not of the form of a content id, not
/// ending in `@` and digits (that is how a version is asked for).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>); // names are handed on far more often than made

impl Name {
    /// The longest name, in bytes: one length byte on the wire.
    pub const MAX_BYTES: usize = 255;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        // Plain ASCII is in NFC as it is; most names are.
        let name: Arc<str> =
            if text.is_ascii() { text.into() } else { text.nfc().collect::<String>().into() };
        if name.is_empty() || name.len() > Self::MAX_BYTES {
            return Err(ParseError("a name is 1 to 255 bytes long"));
        }
        if name.chars().any(is_deceptive) {
            return Err(ParseError("a name holds no control or direction characters"));
        }
        if name.contains(['/', '\\']) || matches!(&*name, "." | "..") {
            return Err(ParseError("a name is no path: it holds no / or \\ and is not . or .."));
        }
        if name.trim() != &*name {
            return Err(ParseError("a name neither begins nor ends with a blank"));
        }
        if name.len() >= 64 && name.parse::<ContentId>().is_ok() {
            return Err(ParseError("a name must not look like a content id"));
        }
        if let Some((_, digits)) = name.rsplit_once('@')
            && digits.bytes().all(|b| b.is_ascii_digit())
        {
            return Err(ParseError(
                "a name must not end in @ and a number: that asks for a version",
            ));
        }
        Ok(Self(name))
    }
}

/// Control characters, and those that make text read otherwise than it is (Unicode's explicit
/// bidirectional marks, zero-width characters, line and paragraph separators, the BOM).
pub(crate) fn is_deceptive(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{2069}' | '\u{FEFF}' | '\u{061C}')
}

/// What a person asks for: `NAME`, `NAME@VERSION` or an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Query {
    /// By content id.
    Id(ContentId),
    /// By name; the newest version unless one is given.
    Name(Name, Option<Version>),
}

impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Name(name, None) => name.fmt(f),
            Self::Name(name, Some(version)) => write!(f, "{name}@{version}"),
        }
    }
}

impl FromStr for Query {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        if let Ok(id) = text.parse() {
            return Ok(Self::Id(id));
        }
        if let Some((name, digits)) = text.rsplit_once('@')
            && !digits.is_empty()
            && digits.bytes().all(|b| b.is_ascii_digit())
        {
            let version = digits.parse().ok().filter(|v| *v > 0);
            let version = version.ok_or(ParseError("a version is a number from 1 on"))?;
            return Ok(Self::Name(name.parse()?, Some(Version(version))));
        }
        Ok(Self::Name(text.parse()?, None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_written_and_read_back_with_its_kind() {
        for id in [ContentId::file([0xab; 32]), ContentId::folder([1; 32])] {
            assert_eq!(id.to_string().parse(), Ok(id));
            assert_eq!(id.to_string().parse(), Ok(Query::Id(id)));
        }
        assert!(ContentId::folder([1; 32]).to_string().ends_with("01/"));
        let peer = PeerId([7; 32]);
        assert_eq!(peer.to_string().parse(), Ok(peer));
        assert_eq!(peer.to_string().len(), 52);
    }

    #[test]
    fn names_that_deceive_or_clash_with_other_forms_are_refused() {
        let long = "x".repeat(256);
        let id = ContentId::file([3; 32]).to_string();
        for bad in [
            "",
            " x",
            "x ",
            "a/b",
            "a\\b",
            ".",
            "..",
            "a\nb",
            "a\u{202E}b",
            "game@2",
            "@7",
            &long,
            &id,
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?} was accepted");
        }
        for good in ["llama-70b", "foo@2x.png", "größe", "日本語", "a b", "user@host"] {
            assert!(good.parse::<Name>().is_ok(), "{good:?} was refused");
        }
        assert_eq!("e\u{301}".parse::<Name>(), "é".parse::<Name>());
    }

    #[test]
    fn a_query_is_a_name_a_name_with_a_version_or_an_id() {
        let game: Name = "game".parse().unwrap();
        assert_eq!("game".parse(), Ok(Query::Name(game.clone(), None)));
        assert_eq!("game@12".parse(), Ok(Query::Name(game, Some(Version(12)))));
        assert!("game@0".parse::<Query>().is_err());
        assert!("game@99999999999".parse::<Query>().is_err());
    }
}
