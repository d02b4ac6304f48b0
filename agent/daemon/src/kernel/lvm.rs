//! Logical volumes, through lvm2's own commands and their JSON reports.
//!
//! Every command names the devices it may look at (`--devices`): the physical
//! volumes of the pool and nothing else, so that a guest's own LVM inside a volume
//! is never scanned, let alone activated. No shell is involved.
//!
//! Starting `lvm` costs more than most of its commands, so what belongs together
//! goes to one process as a script (tools/lvmcmdline.c, `_run_script`): it stops
//! at the first command that fails, with that command's exit status. The last
//! command of a script is a report, and what it reports is what exists.
//!
//! Calls for one volume group are serialised by the caller.

mod report;
mod snapshot;
#[cfg(test)]
mod test;

use std::{path::PathBuf, time::Duration};

use dmlocal_model::name::LVM_TAG;

use self::report::{FIELDS, POOL_FIELDS, read_all_lvs, read_lvs, read_pool};
pub use self::report::{Lv, PoolReport};
use super::exec::{self, ExecError};

/// How long lvm2 may take: it waits for locks and for devices that time out.
const DEADLINE: Duration = Duration::from_secs(120);

/// The last state of the metadata is backed up as ever, but no archive of every state is
/// kept, which would grow without end.
const NO_ARCHIVE: &str = "backup/archive=0";

/// The same for a command that may find the thin pool inactive, with what lvm2's authors
/// mean by default (lib/config/defaults.h, `DEFAULT_THIN_CHECK_OPTION2`). Debian's build
/// lacks the second option. A power cut may leave blocks of the pool given out to nobody:
/// dm-thin takes a block and maps it in two steps, and commits whenever a flush comes
/// between them. `thin_check` gives such blocks back with that option, and without it
/// calls them an error, so that lvm2 refuses to activate the pool.
const CHECKING: &str =
    r#"backup/archive=0 global/thin_check_options=["-q","--clear-needs-check-flag"]"#;

/// The longest line of a script, its newline included (`CMD_LEN` of
/// tools/tools.h is 256, its terminator included).
const LINE: usize = 255;

/// The most words of a line (`MAX_ARGS` of tools/tools.h).
const WORDS: usize = 64;

/// What lvm2 did not do.
#[derive(Debug, thiserror::Error)]
pub enum LvmError {
    /// The volume group or the thin pool has no room.
    #[error("no space: {0}")]
    NoSpace(ExecError),
    /// The logical volume is open, or somebody else works on the volume group and is not
    /// waited for.
    #[error("in use: {0}")]
    InUse(ExecError),
    /// A logical volume of that name exists and is not the wanted one.
    #[error("logical volume {name} exists with a different {field}")]
    Taken {
        /// Its name.
        name: String,
        /// What differs.
        field: &'static str,
    },
    /// lvm2 reported success, but what it made is not in its report.
    #[error("logical volume {0} is missing after it was made")]
    Missing(String),
    /// A name, tag or path that lvm2 would read as something else.
    #[error("`{0}` is not a name for lvm2")]
    Name(String),
    /// It has not ended, and may still do what it was to do.
    #[error("lvm2 has not ended within {0:?}")]
    Late(Duration),
    /// A report that cannot be understood.
    #[error("lvm2's report: {0}")]
    Report(String),
    /// Anything else that lvm2 said.
    #[error(transparent)]
    Exec(ExecError),
}

impl From<ExecError> for LvmError {
    fn from(error: ExecError) -> Self {
        let says = |text: &str| error.stderr.contains(text);
        if says("insufficient free space")
            || says("Insufficient free space")
            || says("insufficient suitable allocatable extents")
            || says("new volumes are not allowed")
            || says("above threshold")
        {
            Self::NoSpace(error)
        } else if says(" in use") || says("an't get lock") || says("is used by another device") {
            Self::InUse(error)
        } else {
            Self::Exec(error)
        }
    }
}

/// A volume group with a thin pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vg {
    /// The volume group's name.
    pub name: String,
    /// Its physical volumes; nothing else is ever looked at.
    pub devices: Vec<PathBuf>,
    /// The thin pool's name, without the group's.
    pub thin_pool: String,
}

type Words = Vec<String>;

impl Vg {
    /// Every logical volume of ours: those with our tag.
    ///
    /// # Errors
    /// Also if the volume group does not exist.
    pub fn lvs(&self) -> Result<Vec<Lv>, LvmError> {
        self.check()?;
        read_lvs(&self.run(&[self.report()])?)
    }

    /// The thin pool; none if it or its volume group does not exist.
    pub fn pool(&self) -> Result<Option<PoolReport>, LvmError> {
        self.check()?;
        // A selection that matches nothing is success, unlike a name that does
        // not exist.
        let select = format!("vg_name=\"{}\" && lv_name=\"{}\"", self.name, self.thin_pool);
        let report = self.command(
            "lvs",
            &[
                "--reportformat",
                "json",
                "--units",
                "b",
                "--nosuffix",
                "-o",
                POOL_FIELDS,
                "-S",
                &select,
            ],
        );
        read_pool(&self.run(&[report])?)
    }

    /// Makes a thin volume, a thick one, or both, tagged and active. What exists
    /// already as it is wanted is taken as made.
    ///
    /// Sizes are in bytes and are rounded up to an extent. The content of a thick
    /// volume is whatever its place held before; nothing of it is read or wiped
    /// here.
    ///
    /// # Errors
    /// [`LvmError::Taken`] if a logical volume of that name has another size or
    /// kind, or lacks a tag; nothing was made then.
    pub fn create(
        &self,
        thin: Option<(&str, u64)>,
        thick: Option<(&str, u64)>,
        tags: &[&str],
    ) -> Result<Vec<Lv>, LvmError> {
        self.check()?;
        let mut wanted = Vec::new();
        wanted.extend(thin.map(|(name, size)| Wanted { name, size, thin: true, tags }));
        wanted.extend(thick.map(|(name, size)| Wanted { name, size, thin: false, tags }));
        for name in wanted.iter().map(|one| one.name).chain(tags.iter().copied()) {
            check_name(name)?;
        }

        // Mostly nothing exists yet, and the pool is active. Then nobody needs to
        // wait for udev (which means two processes for each device): devices are
        // found by number. An inactive pool is checked by a process that looks for
        // the links, and the attempt fails.
        let all: Vec<&Wanted<'_>> = wanted.iter().collect();
        let error = match self.run(&self.creation(&all, &["--noudevsync"])) {
            Ok(text) => return self.pick(&read_all_lvs(&text)?, &wanted),
            Err(error) => error,
        };
        let existing = read_all_lvs(&self.run(&[self.report()])?)?;
        let mut rest = Vec::new();
        let mut idle = Vec::new();
        for one in &wanted {
            match existing.iter().find(|lv| lv.name == one.name) {
                None => rest.push(one),
                Some(lv) => {
                    one.check(lv, &self.thin_pool)?;
                    if !lv.active {
                        idle.push(one.name);
                    }
                }
            }
        }
        if matches!(error, LvmError::NoSpace(_)) && rest.len() == wanted.len() {
            return Err(error);
        }
        idle.push(&self.thin_pool);
        let mut lines = self.creation(&rest, &[]);
        lines.insert(0, self.activation(&idle));
        self.pick(&read_all_lvs(&self.run(&lines)?)?, &wanted)
    }

    fn creation(&self, wanted: &[&Wanted<'_>], options: &[&str]) -> Vec<Words> {
        let mut lines: Vec<Words> =
            wanted.iter().map(|one| self.creation_of(one, options)).collect();
        lines.push(self.report());
        lines
    }

    fn creation_of(&self, wanted: &Wanted<'_>, options: &[&str]) -> Words {
        let size = format!("{}b", wanted.size);
        let pool = format!("{}/{}", self.name, self.thin_pool);
        // Nothing looks for old signatures (-W): what a volume holds is no
        // business of this node, and dmlocal zeroes what must be zero.
        let mut args = options.to_vec();
        args.extend(["-y", "-qq", "-kn", "-Wn", "-n", wanted.name]);
        for tag in std::iter::once(&LVM_TAG).chain(wanted.tags) {
            args.extend(["--addtag", tag]);
        }
        if wanted.thin {
            args.extend(["-V", &size, "-T", &pool]);
        } else {
            args.extend(["-Zn", "-L", &size, &self.name]);
        }
        self.changing("lvcreate", &args)
    }

    /// The wanted volumes out of a report that must have them.
    fn pick(&self, report: &[Lv], wanted: &[Wanted<'_>]) -> Result<Vec<Lv>, LvmError> {
        let mut made = Vec::new();
        for one in wanted {
            let lv = report
                .iter()
                .find(|lv| lv.name == one.name && lv.active)
                .ok_or_else(|| LvmError::Missing(one.name.to_owned()))?;
            one.check(lv, &self.thin_pool)?;
            made.push(lv.clone());
        }
        Ok(made)
    }

    /// Grows a logical volume to this many bytes, rounded up to an extent. One
    /// that is as large or larger is left alone.
    ///
    /// # Errors
    /// [`LvmError::Missing`] if no volume of ours has that name.
    pub fn extend(&self, name: &str, size: u64) -> Result<Lv, LvmError> {
        self.check()?;
        check_name(name)?;
        let path = format!("{}/{name}", self.name);
        let grow = self.changing("lvextend", &["-y", "-qq", "-L", &format!("{size}b"), &path]);
        let find = |text: &str| {
            let found = read_lvs(text)?.into_iter().find(|lv| lv.name == name);
            found.ok_or_else(|| LvmError::Missing(name.to_owned()))
        };
        match self.run(&[grow, self.report()]) {
            Ok(text) => find(&text),
            Err(error) => {
                // lvm2 calls it an error to have nothing to do.
                let lv = find(&self.run(&[self.report()])?)?;
                if lv.size >= size { Ok(lv) } else { Err(error) }
            }
        }
    }

    /// Removes logical volumes by UUID; the name is only for people and errors.
    /// What does not exist, or has our UUID but not our tag, is left alone.
    ///
    /// # Errors
    /// [`LvmError::InUse`] if one is open.
    pub fn remove(&self, lvs: &[(&str, &str)]) -> Result<(), LvmError> {
        self.check()?;
        if lvs.is_empty() {
            return Ok(());
        }
        let mut select = Vec::new();
        for (name, uuid) in lvs {
            check_name(name)?;
            check_name(uuid)?;
            select.push(format!("lv_uuid={uuid}"));
        }
        // One command under one lock: what has the UUID is what is removed.
        let select = format!("tags={{{LVM_TAG}}} && ({})", select.join(" || "));
        self.run(&[self.changing("lvremove", &["-y", "-qq", "-S", &select, &self.name])])?;
        Ok(())
    }

    /// Activates the thin pool and every logical volume of ours.
    ///
    /// lvm2 deactivates a thin pool with its last thin volume unless the pool
    /// itself was activated, and then the next volume has to wait for the pool and
    /// its check; so it is.
    pub fn activate(&self) -> Result<(), LvmError> {
        self.check()?;
        let select = format!("tags={{{LVM_TAG}}}");
        let ours =
            self.changing("lvchange", &["-y", "-qq", "-K", "-ay", "-S", &select, &self.name]);
        self.run(&[self.activation(&[&self.thin_pool]), ours])?;
        Ok(())
    }

    fn activation(&self, names: &[&str]) -> Words {
        let paths: Vec<String> = names.iter().map(|name| format!("{}/{name}", self.name)).collect();
        let mut args = vec!["-y", "-qq", "-K", "-ay"];
        args.extend(paths.iter().map(String::as_str));
        self.changing_by(CHECKING, "lvchange", &args)
    }

    fn report(&self) -> Words {
        let args =
            ["--reportformat", "json", "--units", "b", "--nosuffix", "-o", FIELDS, &self.name];
        self.command("lvs", &args)
    }

    /// A command that changes metadata.
    fn changing(&self, name: &str, args: &[&str]) -> Words {
        self.changing_by(NO_ARCHIVE, name, args)
    }

    /// The same under these settings.
    fn changing_by(&self, settings: &str, name: &str, args: &[&str]) -> Words {
        let mut words = self.command(name, &["--config", settings]);
        words.extend(args.iter().map(ToString::to_string));
        words
    }

    fn command(&self, name: &str, args: &[&str]) -> Words {
        let devices: Vec<String> =
            self.devices.iter().map(|path| path.to_string_lossy().into_owned()).collect();
        let mut words = vec![name.to_owned(), "--devices".to_owned(), devices.join(",")];
        words.extend(args.iter().map(ToString::to_string));
        words
    }

    /// Runs commands up to the first that fails; returns what they wrote.
    fn run(&self, lines: &[Words]) -> Result<String, LvmError> {
        if lines.len() > 1
            && let Some(script) = script(lines)
        {
            return Ok(exec::run("lvm", &["/dev/stdin"], Some(&script), DEADLINE)?);
        }
        let mut written = String::new();
        for line in lines {
            let words: Vec<&str> = line.iter().map(String::as_str).collect();
            written.push_str(&exec::run("lvm", &words, None, DEADLINE)?);
        }
        Ok(written)
    }

    fn check(&self) -> Result<(), LvmError> {
        check_name(&self.name)?;
        check_name(&self.thin_pool)?;
        let bad = |path: &&PathBuf| {
            let text = path.to_str().unwrap_or("");
            !text.starts_with('/') || text.contains([',', '"', '\'', '#'])
        };
        match self.devices.iter().find(bad) {
            Some(path) => Err(LvmError::Name(path.to_string_lossy().into_owned())),
            // Without a list lvm2 would look at every device there is.
            None if self.devices.is_empty() => Err(LvmError::Name("no devices".to_owned())),
            None => Ok(()),
        }
    }
}

struct Wanted<'a> {
    name: &'a str,
    size: u64,
    thin: bool,
    tags: &'a [&'a str],
}

impl Wanted<'_> {
    fn check(&self, lv: &Lv, thin_pool: &str) -> Result<(), LvmError> {
        let taken = |field| Err(LvmError::Taken { name: self.name.to_owned(), field });
        let pool = self.thin.then_some(thin_pool);
        let tagged = |tag: &str| lv.tags.iter().any(|found| found == tag);
        if !std::iter::once(&LVM_TAG).chain(self.tags).all(|tag| tagged(tag)) {
            taken("tag")
        } else if lv.pool_lv.as_deref() != pool {
            taken("kind")
        } else if self.size.div_ceil(lv.extent_size).checked_mul(lv.extent_size) != Some(lv.size) {
            taken("size")
        } else {
            Ok(())
        }
    }
}

/// The commands as a script, if every line is one that lvm2 can read: it splits at
/// white space and knows no quotes.
fn script(lines: &[Words]) -> Option<String> {
    // The first line must look like this one to be taken for a script at all.
    let mut text = "#!lvm\n".to_owned();
    for words in lines {
        let plain = |word: &String| {
            !word.is_empty()
                && !word
                    .contains(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '#' | '\\'))
        };
        let line = words.join(" ");
        if !words.iter().all(plain) || words.len() >= WORDS || line.len() + 1 >= LINE {
            return None;
        }
        text.push_str(&line);
        text.push('\n');
    }
    Some(text)
}

/// lvm2's own alphabet for names and tags (lib/misc/lvm-string.c), without what
/// tags allow beyond, and never an option.
fn check_name(text: &str) -> Result<(), LvmError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._+-".contains(&byte);
    if text.is_empty()
        || text.len() > 127
        || text.starts_with(['-', '.'])
        || !text.bytes().all(plain)
    {
        return Err(LvmError::Name(text.to_owned()));
    }
    Ok(())
}
