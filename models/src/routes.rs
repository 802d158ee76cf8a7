//! Routes: which experts each token was sent to, in a file that is recorded, forced on a model again, and asked what other
//! capacities would have dropped.
//!
//! A route file is little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 8 | `moeroute` |
//! | u32 | version, 1 |
//! | u32 | L, bytes of the header's text |
//! | u64 | T, tokens in all |
//! | u64 | P, passes |
//! | u64 | hash of the last pass |
//! | u64 | hash of all bytes before this one and of the header's text |
//! | L | the header, JSON: a [`RouteHeader`] |
//! | | P passes |
//!
//! A pass is what a model was given at once, and what a capacity is meant for: u32 n (at least 1), the n token ids as i32; for
//! each MoE layer the u32 number of choices it dropped, the experts i32 `[n,k]` (before dropping, -1 for none) and their score
//! values f32 `[n,k]`; and a hash u64 of these bytes. Hashes are xxh3-64; that of a pass is seeded with that of the pass before it,
//! the first one's with that of the header's text. So every byte is covered, also by its place. The length of a file follows
//! from T, P, L and the header.

mod file;
mod read;
mod replay;
mod what_if;
mod write;

use std::path::PathBuf;

pub use file::{LayerRoutes, Pass, RouteHeader, RouteLayer};
pub use read::RouteReader;
pub use replay::RouteTap;
pub use what_if::{LayerWhatIf, WhatIf, what_if};
pub use write::RouteWriter;

/// What can go wrong with routes.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// The system failed.
    #[error("{}: cannot {operation}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another kind of file.
    #[error("{}: not a route file: wanted it to begin with `moeroute`, found {found:?}", path.display())]
    NotRoutes {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        found: String,
    },
    /// A route file of another version.
    #[error("{}: wanted a route file of version {wanted}, found version {found}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version that is read.
        wanted: u32,
        /// Its version.
        found: u32,
    },
    /// The file is not as it was written.
    #[error("{}: damaged route file, {place}: wanted {wanted}, found {found}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Header, pass and layer.
        place: String,
        /// What was wanted there.
        wanted: String,
        /// What is there.
        found: String,
    },
    /// Routes of a model with other layers, experts, choices or tokens.
    #[error("{}: routes of another model, {recorded}: wanted {what} {wanted}, found {found}", path.display())]
    OtherModel {
        /// The file.
        path: PathBuf,
        /// Name of the model that the routes are of.
        recorded: String,
        /// What differs.
        what: &'static str,
        /// The present model's.
        wanted: String,
        /// The file's.
        found: String,
    },
    /// Not enough tokens.
    #[error("{}: too few recorded routes: wanted those of {wanted} tokens, found {found}", path.display())]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Tokens that are run.
        wanted: u64,
        /// Tokens that are recorded.
        found: u64,
    },
    /// Routes of another text.
    #[error("{}: routes of another text: token {position} is {wanted} here, the routes are those of {found}", path.display())]
    OtherToken {
        /// The file.
        path: PathBuf,
        /// Tokens before it.
        position: u64,
        /// The token that is run.
        wanted: i32,
        /// The token that is recorded.
        found: i32,
    },
    /// Every expert is a choice of every token, and which tokens it takes depends on all of them.
    #[error(
        "routes: wanted a router in which tokens choose their experts, found one in which experts choose \
         (model.router.expert_choice)"
    )]
    ExpertsChoose,
    /// Nothing to record.
    #[error("routes: wanted a model with MoE layers, found none in {model}")]
    Dense {
        /// The model.
        model: String,
    },
    /// A graph or the device.
    #[error(transparent)]
    Engine(#[from] moebius::Error),
}
