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

use std::{collections::HashMap, path::PathBuf, time::Duration};

use dmlocal_model::{
    name::{LVM_TAG, LVM_UUID_PREFIX},
    units::DevNo,
};
use serde::Deserialize;

use super::exec::{self, ExecError};

/// How long lvm2 may take: it waits for locks and for devices that time out.
const DEADLINE: Duration = Duration::from_secs(120);

/// The longest line of a script, its newline included (`CMD_LEN` of
/// tools/tools.h is 256, its terminator included).
const LINE: usize = 255;

/// The most words of a line (`MAX_ARGS` of tools/tools.h).
const WORDS: usize = 64;

/// What is asked of a logical volume. lvm2 takes these names without `lv_`, which
/// keeps the line short; the report has their full names.
const FIELDS: &str = "name,uuid,vg_uuid,size,tags,pool_lv,thin_id,active,device_open,\
                      vg_extent_size,kernel_major,kernel_minor";

const POOL_FIELDS: &str = "lv_size,data_percent,metadata_percent,chunk_size,zero,lv_when_full,\
                           vg_free,vg_size,vg_extent_size,vg_uuid,lv_uuid,lv_active";

/// What lvm2 did not do.
#[derive(Debug, thiserror::Error)]
pub enum LvmError {
    /// The volume group or the thin pool has no room.
    #[error("no space: {0}")]
    NoSpace(ExecError),
    /// The logical volume is open.
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
        } else if says(" in use") || says("is used by another device") {
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

/// A logical volume of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lv {
    /// Its name, without the group's.
    pub name: String,
    /// Its UUID, with hyphens in lvm2's places.
    pub uuid: String,
    /// The volume group's UUID, likewise.
    pub vg_uuid: String,
    /// Its size in bytes: what was asked for, rounded up to an extent.
    pub size: u64,
    /// Its tags, [`LVM_TAG`] among them.
    pub tags: Vec<String>,
    /// The thin pool that it lives in; none if it is thick.
    pub pool_lv: Option<String>,
    /// Its number in the thin pool.
    pub thin_id: Option<u32>,
    /// Whether it has a device.
    pub active: bool,
    /// Whether its device is open; a table that stands on it counts.
    pub open: bool,
    /// Its device; only until it is deactivated.
    pub number: Option<DevNo>,
    /// The unit in which sizes are rounded up, in bytes.
    pub extent_size: u64,
}

impl Lv {
    /// The device-mapper UUID of its device (lib/activate/dev_manager.c,
    /// `build_dm_uuid`).
    pub fn dm_uuid(&self) -> String {
        let plain = |text: &str| text.replace('-', "");
        format!("{LVM_UUID_PREFIX}{}{}", plain(&self.vg_uuid), plain(&self.uuid))
    }
}

/// How the thin pool and its volume group are.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolReport {
    /// Size of the thin pool's data, in bytes.
    pub size: u64,
    /// How much of it is allocated, in per cent; none while it is inactive.
    pub data_percent: Option<f64>,
    /// How much of its metadata is, in per cent; none while it is inactive.
    pub metadata_percent: Option<f64>,
    /// The unit of allocation, in bytes.
    pub chunk_size: u64,
    /// Whether a new chunk is zeroed before it is used. Without, one volume's
    /// past shows in another.
    pub zero: bool,
    /// Whether a full pool fails writes; otherwise they wait first.
    pub error_when_full: bool,
    /// Room for thick volumes and for a larger pool, in bytes.
    pub vg_free: u64,
    /// Size of the volume group, in bytes.
    pub vg_size: u64,
    /// The unit in which sizes are rounded up, in bytes.
    pub extent_size: u64,
    /// The volume group's UUID.
    pub vg_uuid: String,
    /// The thin pool's UUID.
    pub pool_uuid: String,
    /// Whether the pool is active.
    pub active: bool,
}

impl PoolReport {
    /// The DM UUID of the device that has the thin-pool target: LVM's `-tpool`
    /// layer, below the pool's own name.
    pub fn tpool_dm_uuid(&self) -> String {
        let plain = |text: &str| text.replace('-', "");
        let (vg, pool) = (plain(&self.vg_uuid), plain(&self.pool_uuid));
        format!("{LVM_UUID_PREFIX}{vg}{pool}-tpool")
    }
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
        let mut lines = self.creation(&rest, &[]);
        if !idle.is_empty() {
            lines.insert(0, self.activation(&idle));
        }
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

    /// Activates every logical volume of ours.
    pub fn activate(&self) -> Result<(), LvmError> {
        self.check()?;
        let select = format!("tags={{{LVM_TAG}}}");
        self.run(&[
            self.changing("lvchange", &["-y", "-qq", "-K", "-ay", "-S", &select, &self.name])
        ])?;
        Ok(())
    }

    fn activation(&self, names: &[&str]) -> Words {
        let paths: Vec<String> = names.iter().map(|name| format!("{}/{name}", self.name)).collect();
        let mut args = vec!["-y", "-qq", "-K", "-ay"];
        args.extend(paths.iter().map(String::as_str));
        self.changing("lvchange", &args)
    }

    fn report(&self) -> Words {
        let args =
            ["--reportformat", "json", "--units", "b", "--nosuffix", "-o", FIELDS, &self.name];
        self.command("lvs", &args)
    }

    /// A command that changes metadata: the last state is backed up as ever, but
    /// no archive of every state is kept, which would grow without end.
    fn changing(&self, name: &str, args: &[&str]) -> Words {
        let mut words = self.command(name, &["--config", "backup/archive=0"]);
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

#[derive(Deserialize)]
struct Report {
    report: Vec<Section>,
}

#[derive(Deserialize)]
struct Section {
    lv: Vec<Row>,
}

/// lvm2 reports everything as text, and nothing as an empty one.
type Row = HashMap<String, String>;

fn rows(text: &str) -> Result<Vec<Row>, LvmError> {
    // Commands before the report may have said something; none of their words has
    // a brace, because no name has.
    let json = text.find('{').map_or("", |start| &text[start..]);
    let report: Report =
        serde_json::from_str(json).map_err(|error| LvmError::Report(error.to_string()))?;
    Ok(report.report.into_iter().flat_map(|section| section.lv).collect())
}

fn field<'a>(row: &'a Row, name: &str) -> Result<&'a str, LvmError> {
    let missing = || LvmError::Report(format!("no field `{name}`"));
    row.get(name).map(String::as_str).ok_or_else(missing)
}

fn number<T: std::str::FromStr>(row: &Row, name: &str) -> Result<T, LvmError> {
    let text = field(row, name)?;
    text.parse().map_err(|_| LvmError::Report(format!("`{text}` in field `{name}`")))
}

/// None if the field is empty.
fn optional<T: std::str::FromStr>(row: &Row, name: &str) -> Result<Option<T>, LvmError> {
    if field(row, name)?.is_empty() { Ok(None) } else { number(row, name).map(Some) }
}

fn filled(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn read_all_lvs(text: &str) -> Result<Vec<Lv>, LvmError> {
    rows(text)?.iter().map(read_lv).collect()
}

fn read_lvs(text: &str) -> Result<Vec<Lv>, LvmError> {
    let mut lvs = read_all_lvs(text)?;
    lvs.retain(|lv| lv.tags.iter().any(|tag| tag == LVM_TAG));
    Ok(lvs)
}

fn read_lv(row: &Row) -> Result<Lv, LvmError> {
    let tags = field(row, "lv_tags")?.split(',').filter(|tag| !tag.is_empty());
    // -1 if it has no device.
    let device = |name| number::<i64>(row, name).map(|value| u32::try_from(value).ok());
    let number_of = device("lv_kernel_major")?.zip(device("lv_kernel_minor")?);
    Ok(Lv {
        name: field(row, "lv_name")?.to_owned(),
        uuid: field(row, "lv_uuid")?.to_owned(),
        vg_uuid: field(row, "vg_uuid")?.to_owned(),
        size: number(row, "lv_size")?,
        tags: tags.map(str::to_owned).collect(),
        pool_lv: filled(field(row, "pool_lv")?),
        thin_id: optional(row, "thin_id")?,
        active: !field(row, "lv_active")?.is_empty(),
        open: !field(row, "lv_device_open")?.is_empty(),
        number: number_of.map(|(major, minor)| DevNo { major, minor }),
        extent_size: number::<u64>(row, "vg_extent_size")?.max(1),
    })
}

fn read_pool(text: &str) -> Result<Option<PoolReport>, LvmError> {
    let rows = rows(text)?;
    let Some(row) = rows.first() else { return Ok(None) };
    Ok(Some(PoolReport {
        size: number(row, "lv_size")?,
        data_percent: optional(row, "data_percent")?,
        metadata_percent: optional(row, "metadata_percent")?,
        chunk_size: number(row, "chunk_size")?,
        zero: !field(row, "zero")?.is_empty(),
        error_when_full: field(row, "lv_when_full")? == "error",
        vg_free: number(row, "vg_free")?,
        vg_size: number(row, "vg_size")?,
        extent_size: number(row, "vg_extent_size")?,
        vg_uuid: field(row, "vg_uuid")?.to_owned(),
        pool_uuid: field(row, "lv_uuid")?.to_owned(),
        active: !field(row, "lv_active")?.is_empty(),
    }))
}

#[cfg(test)]
mod test {
    use super::*;

    fn vg() -> Vg {
        Vg {
            name: "vg0".to_owned(),
            devices: vec![PathBuf::from("/dev/vdb"), PathBuf::from("/dev/vdc")],
            thin_pool: "pool".to_owned(),
        }
    }

    const UUID: &str = "Xy0abc-dEfG-1234-5678-9AbC-DeFg-hIjKlM";
    const VG_UUID: &str = "AAAAAA-bbbb-CCCC-dddd-EEEE-ffff-GGGGGG";

    fn row(name: &str, tags: &str, size: u64, pool: &str) -> String {
        format!(
            r#"{{"lv_name":"{name}", "lv_uuid":"{UUID}", "vg_uuid":"{VG_UUID}",
            "lv_size":"{size}", "lv_tags":"{tags}", "pool_lv":"{pool}", "thin_id":"7",
            "lv_active":"active", "lv_device_open":"", "vg_extent_size":"4194304",
            "lv_kernel_major":"254", "lv_kernel_minor":"9"}}"#
        )
    }

    /// As lvm2 2.03.31 prints it, with the log section of its script mode.
    fn report(rows: &[String]) -> String {
        format!(
            r#"  {{
      "report": [ {{ "lv": [ {} ] }} ]
      ,
      "log": [ {{"log_seq_num":"1", "log_type":"status", "log_message":"success"}} ]
  }}
"#,
            rows.join(",")
        )
    }

    #[test]
    fn a_report_is_read_as_lvm2_prints_it() {
        let text = report(&[row("dmlocal-x-g1", "dmlocal,g1", 8 << 20, "pool")]);
        let lv = read_lvs(&text).unwrap().remove(0);
        assert_eq!(lv.tags, ["dmlocal", "g1"]);
        assert_eq!((lv.size, lv.thin_id), (8 << 20, Some(7)));
        assert_eq!(lv.number, Some(DevNo { major: 254, minor: 9 }));
        assert!(lv.active && !lv.open);
        assert_eq!(
            lv.dm_uuid(),
            "LVM-AAAAAAbbbbCCCCddddEEEEffffGGGGGGXy0abcdEfG123456789AbCDeFghIjKlM"
        );
    }

    #[test]
    fn an_inactive_thick_volume_has_neither_device_nor_pool() {
        let text = report(&[row("m", "dmlocal", 4 << 20, "")])
            .replace(r#""thin_id":"7""#, r#""thin_id":"""#)
            .replace(r#""lv_active":"active""#, r#""lv_active":"""#)
            .replace(r#""254""#, r#""-1""#)
            .replace(r#""9""#, r#""-1""#);
        let lv = read_lvs(&text).unwrap().remove(0);
        assert_eq!((lv.pool_lv, lv.thin_id, lv.number, lv.active), (None, None, None, false));
    }

    #[test]
    fn only_the_whole_tag_makes_a_volume_ours() {
        let tags = ["", "other", "dmlocal-not", "x-dmlocal", "dmlocalx,y", "a,dmlocal"];
        let rows: Vec<_> =
            tags.iter().enumerate().map(|(n, tag)| row(&format!("lv{n}"), tag, 0, "")).collect();
        let ours = read_lvs(&report(&rows)).unwrap();
        assert_eq!(ours.iter().map(|lv| lv.name.as_str()).collect::<Vec<_>>(), ["lv5"]);
    }

    #[test]
    fn a_name_that_looks_like_structure_stays_a_name() {
        // lvm2 lets nobody make these; a report must not be misread all the same.
        let hostile = r#"x\",\"lv_tags\":\"dmlocal"#.replace("\\\\", "\\");
        let text = report(&[row(&hostile, "other", 0, "")]);
        assert!(read_lvs(&text).unwrap().is_empty());
    }

    #[test]
    fn what_is_not_a_report_is_an_error() {
        for text in ["", "nonsense", "{}", r#"{"report":[{"lv":[{"lv_name":"x"}]}]}"#] {
            assert!(matches!(read_lvs(text), Err(LvmError::Report(_))), "{text}");
        }
        assert!(read_lvs(r#"{"report":[{"lv":[]}]}"#).unwrap().is_empty());
    }

    #[test]
    fn a_pool_is_read_and_its_absence_is_not_an_error() {
        let text = r#"{"report":[{"lv":[{"lv_size":"1073741824", "data_percent":"3.25",
            "metadata_percent":"10.90", "chunk_size":"65536", "zero":"zero",
            "lv_when_full":"queue", "vg_free":"4194304", "vg_size":"2147483648",
            "vg_extent_size":"4194304", "vg_uuid":"A-b", "lv_uuid":"C-d",
            "lv_active":"active"}]}]}"#;
        let pool = read_pool(text).unwrap().unwrap();
        assert_eq!((pool.data_percent, pool.metadata_percent), (Some(3.25), Some(10.9)));
        assert!(pool.zero && !pool.error_when_full && pool.active);
        assert_eq!(pool.tpool_dm_uuid(), "LVM-AbCd-tpool");
        assert_eq!(read_pool(r#"{"report":[{"lv":[]}]}"#).unwrap(), None);
    }

    #[test]
    fn a_creation_is_one_script_that_ends_with_the_report() {
        let name = "dmlocal-0b3f9a52-6c1e-4d7a-9f00-1234567890ab-g1";
        let meta = format!("{name}-meta");
        let wanted = [
            Wanted { name, size: 1 << 30, thin: true, tags: &["t"] },
            Wanted { name: &meta, size: 4 << 20, thin: false, tags: &[] },
        ];
        let text =
            script(&vg().creation(&wanted.iter().collect::<Vec<_>>(), &["--noudevsync"])).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "#!lvm");
        assert_eq!(
            lines[1],
            format!(
                "lvcreate --devices /dev/vdb,/dev/vdc --config backup/archive=0 --noudevsync -y \
                 -qq -kn -Wn -n {name} --addtag dmlocal --addtag t -V 1073741824b -T vg0/pool"
            )
        );
        assert!(lines[2].ends_with(" --addtag dmlocal -Zn -L 4194304b vg0"), "{}", lines[2]);
        assert!(lines[3].starts_with("lvs --devices /dev/vdb,/dev/vdc "), "{}", lines[3]);
        assert!(lines.iter().all(|line| line.len() < LINE));
    }

    #[test]
    fn what_a_script_cannot_hold_is_run_command_by_command() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Words>();
        assert!(script(&[words("lvs vg0")]).is_some());
        assert!(script(&[vec!["lvs".to_owned(), "a b".to_owned()]]).is_none());
        assert!(script(&[vec!["lvs".to_owned(), String::new()]]).is_none());
        assert!(script(&[words("lvs #x")]).is_none());
        assert!(script(&[vec!["x".repeat(LINE)]]).is_none());
        assert!(script(&[vec!["x".to_owned(); WORDS]]).is_none());
    }

    #[test]
    fn an_existing_volume_is_adopted_only_if_it_is_the_wanted_one() {
        let extent = 4 << 20;
        let lv = |tags: &str, size, pool: &str| {
            read_all_lvs(&report(&[row("v", tags, size, pool)])).unwrap().remove(0)
        };
        let wanted = Wanted { name: "v", size: extent - 512, thin: true, tags: &["g1"] };
        let field = |lv: &Lv| match wanted.check(lv, "pool") {
            Err(LvmError::Taken { field, .. }) => field,
            Err(_) => "?",
            Ok(()) => "",
        };
        assert_eq!(field(&lv("g1,dmlocal", extent, "pool")), "");
        assert_eq!(field(&lv("g1", extent, "pool")), "tag");
        assert_eq!(field(&lv("dmlocal", extent, "pool")), "tag");
        assert_eq!(field(&lv("dmlocal,g1", extent * 2, "pool")), "size");
        assert_eq!(field(&lv("dmlocal,g1", extent, "")), "kind");
        assert_eq!(field(&lv("dmlocal,g1", extent, "other")), "kind");
    }

    #[test]
    fn names_that_lvm2_would_read_as_something_else_are_refused() {
        for bad in ["", "-y", ".", "..", "a/b", "a b", "a\nb", "@tag", "a,b", "a\"b", "a{b"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        check_name("dmlocal-0b3f9a52-6c1e-4d7a-9f00-1234567890ab-g1-meta").unwrap();
        let no_devices = Vg { devices: Vec::new(), ..vg() };
        assert!(matches!(no_devices.lvs(), Err(LvmError::Name(_))));
        for bad in ["vdb", "/dev/a,b", "/dev/a\"b", ""] {
            let bad = Vg { devices: vec![PathBuf::from(bad)], ..vg() };
            assert!(matches!(bad.lvs(), Err(LvmError::Name(_))));
        }
    }
}
