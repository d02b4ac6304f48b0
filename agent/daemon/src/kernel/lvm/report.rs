//! What lvm2 reports, as JSON.

use std::collections::HashMap;

use dmlocal_model::{
    name::{LVM_TAG, LVM_UUID_PREFIX},
    units::DevNo,
};
use serde::Deserialize;

use super::LvmError;

/// What is asked of a logical volume. lvm2 takes these names without `lv_`, which
/// keeps the line short; the report has their full names.
pub(super) const FIELDS: &str = "name,uuid,vg_uuid,size,tags,pool_lv,thin_id,active,device_open,\
                      vg_extent_size,kernel_major,kernel_minor,origin_uuid";

/// What is asked of a thin pool.
pub(super) const POOL_FIELDS: &str = "lv_size,data_percent,metadata_percent,chunk_size,zero,lv_when_full,\
                           vg_free,vg_size,vg_extent_size,vg_uuid,lv_uuid,lv_active";

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
    /// UUID of what it is a thin snapshot of, as long as that exists.
    pub origin_uuid: Option<String>,
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

pub(super) fn read_all_lvs(text: &str) -> Result<Vec<Lv>, LvmError> {
    rows(text)?.iter().map(read_lv).collect()
}

pub(super) fn read_lvs(text: &str) -> Result<Vec<Lv>, LvmError> {
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
        origin_uuid: filled(field(row, "origin_uuid")?),
    })
}

pub(super) fn read_pool(text: &str) -> Result<Option<PoolReport>, LvmError> {
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
