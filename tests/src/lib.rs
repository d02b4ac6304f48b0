//! The bed that dmlocal is tested in: several nodes with real kernels, LVM and
//! NVMe/TCP, as virtual machines on one machine.
//!
//! ```text
//! packages   what the host needs, from its own package manager
//! debian     a Debian root with the dm-clone module (cached)
//! image      snapshot of an idle node (cached)
//! network    a namespace with a bridge; nothing in it reaches any other network
//! qemu       one virtual machine: command line, QMP, its process
//! guest      commands inside a node, over a card of the bed's own
//! cluster    nodes with names, from start to take-down
//! install    dmlocal on a node
//! content    what dmlocal-writer writes and checks inside a node
//! boot       a boot disk for a guest inside a node
//! python     Python with what the Cinder driver is tested with (cached)
//! controller a disk with Cinder, for a node that Cinder is to run on (cached)
//! ```
//!
//! A node starts in about two seconds, because it is a restored snapshot with
//! disks laid over those of the snapshot. The bed refuses to be a test of
//! anything but what runs on the nodes: it has no notion of volumes or moves.

pub mod boot;
pub mod cluster;
pub mod content;
pub mod controller;
mod debian;
pub mod guest;
mod host;
pub mod image;
mod install;
pub mod network;
pub mod packages;
pub mod python;
pub mod qemu;
pub mod wire;

pub use cluster::{Cluster, Node, Options};
pub use guest::{Output, Running};
pub use host::{binaries, cargo, repository};
