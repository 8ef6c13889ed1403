//! Owns what a content is, apart from where it lies: id, layout, proof, manifest, checked against
//! each other. Never touches the disk.

use potluck_core::bitfield::Bitfield;
use potluck_core::id::{ContentId, Kind};
use potluck_core::layout::Layout;
use potluck_core::manifest::{Manifest, RelPath};
use potluck_core::proof::Proof;

use crate::error::{Error, ErrorKind, Result};

/// A content; everything in it agrees with its id.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) id: ContentId,
    pub(super) layout: Layout,
    pub(super) proof: Proof,
    /// As sent; empty for a file.
    pub(super) manifest: Vec<u8>,
    /// One a file of the layout.
    pub(super) files: Vec<FileName>,
    pub(super) empty: Vec<RelPath>,
}

/// What a file of a content is called.
#[derive(Clone, Debug)]
pub(super) struct FileName {
    /// Within the folder; none where the content is a single file.
    pub(super) path: Option<RelPath>,
    pub(super) executable: bool,
}

impl Content {
    /// Checks what another machine, or this machine's disk, says of `id`.
    ///
    /// # Errors
    /// [`ErrorKind::Integrity`]: manifest, proof or size are not those of `id`, or the manifest is
    /// refused.
    pub(super) fn checked(id: ContentId, size: u64, manifest: &[u8], proof: &[u8]) -> Result<Self> {
        let wrong = |why: &dyn std::fmt::Display| {
            let short = id.short();
            Error::new(ErrorKind::Integrity, format!("the description of {short} is wrong: {why}"))
        };
        if id.kind == Kind::File {
            if !manifest.is_empty() {
                return Err(wrong(&"a file has no manifest"));
            }
            let layout = Layout::new([size]).map_err(|e| wrong(&e))?;
            let proof = Proof::of_file(id.hash, &layout, proof).map_err(|e| wrong(&e))?;
            let files = vec![FileName { path: None, executable: false }];
            return Ok(Self { id, layout, proof, manifest: Vec::new(), files, empty: Vec::new() });
        }
        if *blake3::hash(manifest).as_bytes() != id.hash {
            return Err(wrong(&"the manifest is another folder's"));
        }
        let manifest = Manifest::decode(manifest).map_err(|e| wrong(&e))?;
        let layout = manifest.layout().map_err(|e| wrong(&e))?;
        if layout.total() != size {
            return Err(wrong(&"its size is not that of its files"));
        }
        let proof = Proof::of_folder(&manifest, &layout, proof).map_err(|e| wrong(&e))?;
        Ok(Self::of_folder(&manifest, layout, proof))
    }

    /// The content of a manifest whose layout and proof are these.
    pub(super) fn of_folder(manifest: &Manifest, layout: Layout, proof: Proof) -> Self {
        let named = |file: potluck_core::manifest::FileEntry<'_>| FileName {
            path: Some(file.path.clone()),
            executable: file.executable,
        };
        let bytes = manifest.encode();
        Self {
            id: ContentId::folder(*blake3::hash(&bytes).as_bytes()),
            layout,
            proof,
            manifest: bytes,
            files: manifest.files().map(named).collect(),
            empty: manifest.empty_folders().cloned().collect(),
        }
    }

    /// Every folder in it, deepest last.
    pub(super) fn folders(&self) -> std::collections::BTreeSet<&str> {
        let paths = self.files.iter().filter_map(|file| file.path.as_ref()?.parent());
        let paths = paths.chain(self.empty.iter().map(RelPath::as_str));
        paths
            .flat_map(|path| {
                let above = path.match_indices('/').map(|(at, _)| &path[..at]);
                above.chain(std::iter::once(path))
            })
            .collect()
    }

    pub(super) fn none(&self) -> Bitfield {
        Bitfield::none(self.layout.pieces())
    }
}
