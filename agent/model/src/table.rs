//! Device-mapper tables: the few that dmlocal loads, written for the kernel and
//! read back from it.

use std::fmt::Write as _;

use crate::units::{DevNo, Sectors};

/// How long a write is held by the `delay` target when nothing releases it, in
/// milliseconds: for ever, because the kernel takes what is negative as an `int`
/// for the longest time there is (`msecs_to_jiffies`, kernel/time/time.c).
/// Suspending the device releases it at once.
pub const HOLD_MS: u32 = u32::MAX;

/// One target.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// Fails every request.
    Error,
    /// A window on another device.
    Linear {
        /// The device below.
        device: DevNo,
        /// Where the window starts on it.
        offset: Sectors,
    },
    /// Reads pass; writes wait ([`HOLD_MS`]). Flushes go to a device of their own.
    Hold {
        /// The device below.
        device: DevNo,
        /// Where the window starts on it.
        offset: Sectors,
        /// What is flushed.
        flush: DevNo,
    },
    /// Reads and flushes pass; writes fail, because they go to the node's refuser,
    /// which fails everything. nvmet cannot export read-only by itself, and flakey,
    /// which can fail writes, fails flushes as well.
    ReadOnly {
        /// The device below.
        device: DevNo,
        /// Where the window starts on it.
        offset: Sectors,
    },
    /// Reads of the source that wait while there is no path to it.
    Queue {
        /// The device below; none while the source is away.
        path: Option<DevNo>,
    },
    /// Reads of a source that is lost for ever: they fail. It is a multipath device
    /// like [`Target::Queue`], because a table of that kind gives way to none of
    /// another (`DM_TARGET_IMMUTABLE`, drivers/md/dm-mpath.c).
    Lost,
    /// Like [`Target::Queue`], of a source that takes writes: loaded writable, which the
    /// parameters do not tell.
    WritableQueue {
        /// The device below; none while the source is away.
        path: Option<DevNo>,
    },
    /// dm-clone, always made with hydration off, and never passing a discard down:
    /// one that reaches it says that a region is here, and must not take from the
    /// destination what was written there.
    Clone {
        /// Metadata device.
        meta: DevNo,
        /// Destination device.
        dest: DevNo,
        /// Source device.
        src: DevNo,
        /// Region size.
        region: Sectors,
    },
    /// A target that dmlocal never loads.
    Foreign {
        /// Its type.
        kind: String,
    },
}

/// What serves a device: one target, or two, of which the second begins where a
/// volume has grown beyond what is being copied.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Table {
    /// Length of the device.
    pub length: Sectors,
    /// What serves it from its start.
    pub target: Target,
    /// From where on something else serves it, and what.
    pub tail: Option<(Sectors, Target)>,
}

impl Table {
    /// One target over everything.
    pub const fn whole(length: Sectors, target: Target) -> Self {
        Self { length, target, tail: None }
    }

    /// The table of these targets, each with its length; none for no target. What
    /// has more than two is nobody's table here.
    pub fn of(targets: Vec<(Sectors, Target)>) -> Option<Self> {
        let length = Sectors(targets.iter().map(|(length, _)| length.0).sum());
        let mut targets = targets.into_iter();
        let (at, target) = targets.next()?;
        let (tail, more) = (targets.next(), targets.next());
        if more.is_some() {
            let kind = target.kind().to_owned();
            return Some(Self::whole(length, Target::Foreign { kind }));
        }
        Some(Self { length, target, tail: tail.map(|(_, then)| (at, then)) })
    }

    /// A handle that holds writes back, over a copy whose last block of so many sectors
    /// begins a target of its own: the kernel sends a flush to every target of a table
    /// (drivers/md/dm.c, `__send_empty_flush`), so each one reaches the source, where
    /// what was written until now is, and the copy as well, where held writes are from
    /// the moment at which a swap lets them go.
    ///
    /// A volume of a single block has no room for that; its flushes go to the source.
    pub fn held(length: Sectors, copy: DevNo, source: DevNo, block: Sectors) -> Self {
        let hold = |offset, flush| Target::Hold { device: copy, offset, flush };
        let at = Sectors(length.0.saturating_sub(block.0));
        let tail = (at.0 > 0).then(|| (at, hold(at, copy)));
        Self { length, target: hold(Sectors(0), source), tail }
    }

    /// Start, length and target of each line for the kernel.
    pub fn lines(&self) -> Vec<(Sectors, Sectors, &Target)> {
        match &self.tail {
            None => vec![(Sectors(0), self.length, &self.target)],
            Some((at, then)) => {
                let rest = Sectors(self.length.0.saturating_sub(at.0));
                vec![(Sectors(0), *at, &self.target), (*at, rest, then)]
            }
        }
    }

    /// Every device that it stands on.
    pub fn devices(&self) -> Vec<DevNo> {
        self.lines().iter().flat_map(|(.., target)| target.devices()).collect()
    }
}

impl Target {
    /// The target type's name in the kernel.
    pub fn kind(&self) -> &str {
        match self {
            Self::Error => "error",
            Self::Linear { .. } => "linear",
            Self::Hold { .. } | Self::ReadOnly { .. } => "delay",
            Self::Queue { .. } | Self::WritableQueue { .. } | Self::Lost => "multipath",
            Self::Clone { .. } => "clone",
            Self::Foreign { kind } => kind,
        }
    }

    /// The parameters for the kernel's constructor. Of `delay` they are devices,
    /// offsets and milliseconds for reads, writes and flushes.
    pub fn params(&self, refuser: DevNo) -> String {
        match self {
            Self::Error | Self::Foreign { .. } => String::new(),
            Self::Linear { device, offset } => format!("{device} {offset}"),
            Self::Hold { device, offset, flush } => {
                format!("{device} {offset} 0 {device} {offset} {HOLD_MS} {flush} 0 0")
            }
            Self::ReadOnly { device, offset } => {
                format!("{device} {offset} 0 {refuser} 0 0 {device} {offset} 0")
            }
            Self::Queue { path } | Self::WritableQueue { path } => {
                let mut text = "3 queue_if_no_path queue_mode bio 0 ".to_owned();
                match path {
                    None => text.push_str("0 0"),
                    Some(device) => {
                        // Writing to a String cannot fail.
                        let _ = write!(text, "1 1 round-robin 0 1 1 {device} 1");
                    }
                }
                text
            }
            Self::Lost => "2 queue_mode bio 0 0 0".to_owned(),
            Self::Clone { meta, dest, src, region } => {
                format!("{meta} {dest} {src} {region} 2 no_hydration no_discard_passdown")
            }
        }
    }

    /// Reads a line of the kernel's TABLE status. What does not have the form
    /// that dmlocal loads is [`Target::Foreign`], so that it is never mistaken
    /// for a table that may stay.
    pub fn parse(kind: &str, params: &str, refuser: DevNo) -> Self {
        let words: Vec<&str> = params.split_ascii_whitespace().collect();
        Self::recognise(kind, &words, refuser)
            .unwrap_or_else(|| Self::Foreign { kind: kind.to_owned() })
    }

    fn recognise(kind: &str, words: &[&str], refuser: DevNo) -> Option<Self> {
        let device = |index: usize| words.get(index)?.parse::<DevNo>().ok();
        let sectors = |index: usize| words.get(index)?.parse().ok().map(Sectors);
        Some(match kind {
            "error" => Self::Error,
            "linear" if words.len() == 2 => {
                Self::Linear { device: device(0)?, offset: sectors(1)? }
            }
            "delay" if words.len() == 9 => {
                let (below, offset) = (device(0)?, sectors(1)?);
                let hold = Self::Hold { device: below, offset, flush: device(6)? };
                let window = Self::ReadOnly { device: below, offset };
                let loaded = |target: &Self| target.params(refuser) == words.join(" ");
                [hold, window].into_iter().find(loaded)?
            }
            // The kernel prints features and path arguments in its own order.
            "multipath" if words.contains(&"queue_if_no_path") => {
                Self::Queue { path: words.iter().find_map(|word| word.parse().ok()) }
            }
            "multipath" if !words.iter().any(|word| word.parse::<DevNo>().is_ok()) => Self::Lost,
            "clone" => Self::Clone {
                meta: device(0)?,
                dest: device(1)?,
                src: device(2)?,
                region: sectors(3)?,
            },
            _ => return None,
        })
    }

    /// Every device that the table stands on.
    pub fn devices(&self) -> Vec<DevNo> {
        match self {
            Self::Error | Self::Lost | Self::Foreign { .. } => Vec::new(),
            Self::Linear { device, .. } | Self::ReadOnly { device, .. } => vec![*device],
            Self::Hold { device, flush, .. } => vec![*device, *flush],
            Self::Queue { path } | Self::WritableQueue { path } => path.iter().copied().collect(),
            Self::Clone { meta, dest, src, .. } => vec![*meta, *dest, *src],
        }
    }
}

/// What dm-clone says of itself (drivers/md/dm-clone-target.c, `clone_status`).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CloneStatus {
    /// It works.
    Working {
        /// Regions that are at the destination, in memory.
        hydrated: u64,
        /// All regions.
        total: u64,
        /// Regions being copied now; may show one too many for a moment.
        hydrating: u64,
        /// Whether background hydration is on.
        enabled: bool,
        /// Whether metadata can no longer be written.
        read_only: bool,
    },
    /// It refuses everything, or its line cannot be read.
    Failed,
}

impl CloneStatus {
    /// Reads the target's INFO status.
    pub fn parse(params: &str) -> Self {
        Self::recognise(params).unwrap_or(Self::Failed)
    }

    fn recognise(params: &str) -> Option<Self> {
        let words: Vec<&str> = params.split_ascii_whitespace().collect();
        let (hydrated, total) = words.get(3)?.split_once('/')?;
        let hydrating = words.get(4)?.parse().ok()?;
        let features: usize = words.get(5)?.parse().ok()?;
        let enabled = !words.get(6..features.checked_add(6)?)?.contains(&"no_hydration");
        let read_only = match *words.last()? {
            "rw" => false,
            "ro" => true,
            _ => return None,
        };
        Some(Self::Working {
            hydrated: hydrated.parse().ok()?,
            total: total.parse().ok()?,
            hydrating,
            enabled,
            read_only,
        })
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    /// Beyond what [`any_device`] makes, so that nothing else is taken for it.
    const REFUSER: DevNo = DevNo { major: 4096, minor: 0 };

    fn any_device() -> impl Strategy<Value = DevNo> {
        (0u32..4096, 0u32..(1 << 20)).prop_map(|(major, minor)| DevNo { major, minor })
    }

    fn any_target() -> impl Strategy<Value = Target> {
        prop_oneof![
            Just(Target::Error),
            Just(Target::Lost),
            (any_device(), any::<u64>())
                .prop_map(|(device, offset)| Target::Linear { device, offset: Sectors(offset) }),
            (any_device(), any::<u64>(), any_device()).prop_map(|(device, offset, flush)| {
                Target::Hold { device, offset: Sectors(offset), flush }
            }),
            (any_device(), any::<u64>())
                .prop_map(|(device, offset)| Target::ReadOnly { device, offset: Sectors(offset) }),
            proptest::option::of(any_device()).prop_map(|path| Target::Queue { path }),
            (any_device(), any_device(), any_device(), 8u64..(1 << 21)).prop_map(
                |(meta, dest, src, region)| Target::Clone {
                    meta,
                    dest,
                    src,
                    region: Sectors(region)
                }
            ),
        ]
    }

    proptest! {
        #[test]
        fn what_is_loaded_is_recognised(target in any_target()) {
            prop_assert_eq!(Target::parse(target.kind(), &target.params(REFUSER), REFUSER), target);
        }

        #[test]
        fn a_table_survives_its_lines(
            first in any_target(), then in proptest::option::of(any_target()),
            at in 1u64..1000, rest in 1u64..1000
        ) {
            let length = Sectors(at + if then.is_some() { rest } else { 0 });
            let table = Table { length, target: first, tail: then.map(|then| (Sectors(at), then)) };
            let lines = table.lines().into_iter();
            let again = lines.map(|(_, length, target)| (length, target.clone())).collect();
            prop_assert_eq!(Table::of(again), Some(table));
        }

        #[test]
        fn nothing_the_kernel_says_makes_the_parser_panic(kind in ".*", params in ".*") {
            let _ = Target::parse(&kind, &params, REFUSER);
            let _ = CloneStatus::parse(&params);
        }
    }

    #[test]
    fn a_delay_that_would_let_writes_through_is_foreign() {
        for passing in ["8:0 0 0 8:0 0 0 8:0 0 0", "8:0 0 0 8:0 0 0 8:16 0 0"] {
            let target = Target::parse("delay", passing, REFUSER);
            assert_eq!(target, Target::Foreign { kind: "delay".to_owned() }, "{passing}");
        }
    }

    #[test]
    fn clone_status_is_read_as_the_kernel_prints_it() {
        let text = "8 22/1024 128 1500/8192 3 1 no_hydration 4 hydration_threshold 1 \
                    hydration_batch_size 1 rw";
        assert_eq!(
            CloneStatus::parse(text),
            CloneStatus::Working {
                hydrated: 1500,
                total: 8192,
                hydrating: 3,
                enabled: false,
                read_only: false
            }
        );
        let read_only = text.replace("1 no_hydration", "0").replace("rw", "ro");
        assert!(matches!(
            CloneStatus::parse(&read_only),
            CloneStatus::Working { enabled: true, read_only: true, .. }
        ));
        for failed in ["Fail", "Error", "", "8 22/1024 128 x/y 0 0 rw"] {
            assert_eq!(CloneStatus::parse(failed), CloneStatus::Failed, "{failed}");
        }
    }
}
