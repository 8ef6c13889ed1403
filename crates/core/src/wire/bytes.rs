//! Owns the two cursors all formats are read and written with. Never panics on what it reads, and
//! never writes a text that it would not read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::id::{ContentId, Kind, Name, Version};
use crate::layout::{MAX_PIECE_LOG2, MAX_PIECES};

/// The largest content, in bytes: as many pieces as there may be, of the largest size. No sum of
/// fewer than a million sizes overflows.
pub const MAX_CONTENT: u64 = (MAX_PIECES as u64) << MAX_PIECE_LOG2;

/// Bytes that are not the format they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed: {0}")]
pub struct Malformed(pub &'static str);

/// Reads a format from its front to its end.
#[derive(Clone, Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Begins at the first byte.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// What was not read yet.
    pub const fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// All that is left, as bytes.
    pub fn take_rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(Malformed("it ends too early"))?;
        self.0 = rest;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed("it ends too early"))?;
        self.0 = rest;
        Ok(*head)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    /// Two bytes, big-endian.
    pub fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    /// Four bytes, big-endian.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// Eight bytes, big-endian.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// A length byte and so many bytes.
    pub fn bytes8(&mut self) -> Result<&'a [u8], Malformed> {
        let n = self.u8()?;
        self.take(n.into())
    }

    /// A two-byte length and so many bytes.
    pub fn bytes16(&mut self) -> Result<&'a [u8], Malformed> {
        let n = self.u16()?;
        self.take(n.into())
    }

    /// A length byte and UTF-8 text without control characters.
    pub fn text8(&mut self) -> Result<&'a str, Malformed> {
        let text =
            std::str::from_utf8(self.bytes8()?).map_err(|_| Malformed("text is not UTF-8"))?;
        if text.chars().any(crate::id::is_deceptive) {
            return Err(Malformed("text holds control characters"));
        }
        Ok(text)
    }

    /// A byte that is 0 (no) or 1 (yes).
    pub fn flag(&mut self) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed("a flag is 0 or 1")),
        }
    }

    /// `count` things of at least `least` bytes each. A count that the bytes left cannot hold is
    /// refused before anything is allocated.
    pub fn many<T>(
        &mut self,
        count: usize,
        least: usize,
        mut one: impl FnMut(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Vec<T>, Malformed> {
        if count.checked_mul(least).is_none_or(|bytes| bytes > self.0.len()) {
            return Err(Malformed("it ends too early"));
        }
        let mut all = Vec::with_capacity(count);
        for _ in 0..count {
            all.push(one(self)?);
        }
        Ok(all)
    }

    /// A content's size: eight bytes, at most [`MAX_CONTENT`].
    pub fn size(&mut self) -> Result<u64, Malformed> {
        match self.u64()? {
            size if size <= MAX_CONTENT => Ok(size),
            _ => Err(Malformed("no content is so large")),
        }
    }

    /// A content id: kind byte (0 file, 1 folder), 32 bytes of hash.
    pub fn content(&mut self) -> Result<ContentId, Malformed> {
        let kind = match self.u8()? {
            0 => Kind::File,
            1 => Kind::Folder,
            _ => return Err(Malformed("a content is a file or a folder")),
        };
        Ok(ContentId { kind, hash: self.array()? })
    }

    /// A name, length byte first.
    pub fn name(&mut self) -> Result<Name, Malformed> {
        let text = self.text8()?;
        let name: Name = text.parse().map_err(|_| Malformed("not a name"))?;
        if name.as_str() != text {
            return Err(Malformed("a name is not in its normal form"));
        }
        Ok(name)
    }

    /// A version: four bytes, not zero.
    pub fn version(&mut self) -> Result<Version, Malformed> {
        match self.u32()? {
            0 => Err(Malformed("a version counts from 1")),
            n => Ok(Version(n)),
        }
    }

    /// An address: family byte (4, 6), address, port. An IPv4 address is never written as IPv6.
    pub fn address(&mut self) -> Result<SocketAddr, Malformed> {
        let ip: IpAddr = match self.u8()? {
            4 => Ipv4Addr::from(self.array::<4>()?).into(),
            6 => Ipv6Addr::from(self.array::<16>()?).into(),
            _ => return Err(Malformed("an address is IPv4 or IPv6")),
        };
        if ip != ip.to_canonical() {
            return Err(Malformed("an IPv4 address is written as IPv6"));
        }
        Ok(SocketAddr::new(ip, self.u16()?))
    }

    /// Nothing but zeroes may be left.
    pub fn padding(&self) -> Result<(), Malformed> {
        if self.0.iter().all(|byte| *byte == 0) {
            Ok(())
        } else {
            Err(Malformed("its padding is not zero"))
        }
    }

    /// Nothing may be left.
    pub fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("it goes on after its end")) }
    }
}

/// Writes a format to the end of a byte vector; the mirror of [`Reader`].
pub trait Writer {
    /// One byte.
    fn u8(&mut self, n: u8);
    /// Raw bytes.
    fn put(&mut self, bytes: &[u8]);
    /// Two bytes, big-endian.
    fn u16(&mut self, n: u16) {
        self.put(&n.to_be_bytes());
    }
    /// Four bytes, big-endian.
    fn u32(&mut self, n: u32) {
        self.put(&n.to_be_bytes());
    }
    /// Eight bytes, big-endian.
    fn u64(&mut self, n: u64) {
        self.put(&n.to_be_bytes());
    }
    /// A length byte and at most 255 bytes (longer ones are cut: callers hold the limit).
    fn bytes8(&mut self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(255)];
        self.u8(bytes.len() as u8);
        self.put(bytes);
    }
    /// A two-byte length and at most 65,535 bytes.
    fn bytes16(&mut self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(usize::from(u16::MAX))];
        self.u16(bytes.len() as u16);
        self.put(bytes);
    }
    /// Text without its control characters, cut at a character to at most 255 bytes.
    fn text8(&mut self, text: &str) {
        self.text_within(text, 255);
    }
    /// Text without its control characters, cut at a character to at most `most` (≤ 255) bytes.
    fn text_within(&mut self, text: &str, most: usize) {
        if text.chars().any(crate::id::is_deceptive) {
            let clean: String = text.chars().filter(|c| !crate::id::is_deceptive(*c)).collect();
            self.bytes8(&clean.as_bytes()[..clean.floor_char_boundary(most)]);
        } else {
            self.bytes8(&text.as_bytes()[..text.floor_char_boundary(most)]);
        }
    }
    /// A content id.
    fn content(&mut self, id: &ContentId) {
        self.u8(match id.kind {
            Kind::File => 0,
            Kind::Folder => 1,
        });
        self.put(&id.hash);
    }
    /// An address.
    fn address(&mut self, address: SocketAddr) {
        match address.ip().to_canonical() {
            IpAddr::V4(ip) => {
                self.u8(4);
                self.put(&ip.octets());
            }
            IpAddr::V6(ip) => {
                self.u8(6);
                self.put(&ip.octets());
            }
        }
        self.u16(address.port());
    }
}

/// Defines an enum of stable numbers together with the way back from a number.
macro_rules! numbers {
    (
        $(#[$of_enum:meta])*
        pub enum $name:ident else $unknown:literal {
            $($(#[$of_variant:meta])* $variant:ident = $number:literal,)+
        }
    ) => {
        $(#[$of_enum])*
        #[repr(u16)]
        pub enum $name {
            $($(#[$of_variant])* $variant = $number,)+
        }

        impl $name {
            /// All there are, by number.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The one with this number.
            pub const fn from_number(number: u16) -> Result<Self, Malformed> {
                match number {
                    $($number => Ok(Self::$variant),)+
                    _ => Err(Malformed($unknown)),
                }
            }
        }
    };
}
pub(super) use numbers;

impl Writer for Vec<u8> {
    fn u8(&mut self, n: u8) {
        self.push(n);
    }
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}
