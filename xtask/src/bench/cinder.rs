//! How soon volumes are usable through the Cinder driver, beside Cinder's LVM driver.

use anyhow::{Context, Result, ensure};
use dmlocal_testbed::controller;
use serde_json::Value;

use super::{Bench, Row, median, shell};

pub(super) const NAMES: [&str; 3] =
    ["create_attach_over_lvm", "cached_image_over_lvm", "cached_image_growth"];

/// What is written of the volumes of 1 GiB that the image cache has.
const IMAGES_MIB: [u32; 2] = [256, 1024];

/// Certificates, and what Cinder writes.
const FOLDER: &str = "/root/cached";

/// The volume group of Cinder's LVM driver: a disk like that of the nodes' pools.
const GROUP: &str = "cached";
const GROUP_BYTES: u64 = 6 << 30;

impl Bench<'_> {
    /// Both drivers in one process on the second node, in turns. The one copies within its
    /// disk, the other takes what is on the first node.
    pub(super) fn beside_lvm(&self) -> Result<Vec<Row>> {
        controller::install(self.b)?;
        let disk = self.b.add_disk("cached", GROUP_BYTES)?;
        let mut entries = Vec::new();
        for mib in IMAGES_MIB {
            let id = self.volume(self.a, 1024)?;
            let fill = format!(
                "dd if=/dev/urandom of=/dev/mapper/dmlocal-{id} bs=1M count={mib} oflag=direct"
            );
            shell(self.a, &fill)?;
            shell(self.a, &format!("dmlocalctl volume detach {id}"))?;
            entries.push(id);
        }
        let prepare = format!(
            "mkdir {FOLDER} && cp /etc/dmlocal/pki/ca.pem /etc/dmlocal/pki/driver.* {FOLDER} && \
             vgcreate -qq {GROUP} {disk} && \
             lvcreate -qq --type thin-pool --size 1g --name {GROUP}-pool {GROUP}"
        );
        shell(self.b, &prepare)?;
        let [from, here] = [self.a.name(), self.b.name()];
        let order = format!(
            "cd {} && PYTHONDONTWRITEBYTECODE=1 {} -m cinder_dmlocal.tests.beside_lvm {FOLDER} \
             {GROUP} {from} {here} {} {from}={from}:7450 {here}={here}:7450",
            controller::DRIVER,
            controller::PYTHON,
            entries.join(" "),
        );
        let told: Value = serde_json::from_str(&shell(self.b, &order)?)?;
        let clean = format!("vgremove -qq -y {GROUP} && rm -r {FOLDER}");
        shell(self.b, &clean)?;
        for id in &entries {
            shell(self.a, &format!("dmlocalctl volume delete {id}"))?;
        }
        let small = seconds(&told["dmlocal"][&entries[0]])?;
        let big = seconds(&told["dmlocal"][&entries[1]])?;
        let copied = seconds(&told["lvm"])?;
        let [ours, theirs] = ["dmlocal", "lvm"].map(|whose| seconds(&told["blank"][whose]));
        let (ours, theirs) = (ours?, theirs?);
        let row = |name, value, bar, detail| Row { name, value, bar, at_least: false, detail };
        Ok(vec![
            row(
                NAMES[0],
                median(&ours) / median(&theirs),
                1.1,
                format!("s: attached {ours:.2?}; made by LVM's driver, not attached {theirs:.2?}"),
            ),
            row(
                NAMES[1],
                median(&big) / median(&copied),
                0.3,
                format!("s: usable elsewhere {big:.2?}, copied by LVM's driver {copied:.2?}"),
            ),
            row(
                NAMES[2],
                median(&big) / median(&small),
                1.5,
                format!("s: {IMAGES_MIB:?} MiB written {small:.2?}, {big:.2?}"),
            ),
        ])
    }
}

fn seconds(told: &Value) -> Result<Vec<f64>> {
    let all = told.as_array().context("no figures")?;
    let all: Vec<f64> = all.iter().filter_map(Value::as_f64).collect();
    ensure!(!all.is_empty(), "no figures: {told}");
    Ok(all)
}
