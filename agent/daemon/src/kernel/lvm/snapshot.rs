//! Thin snapshots.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, sync_channel},
    thread,
    time::Duration,
};

use super::{LVM_TAG, Lv, LvmError, NO_ARCHIVE, Vg, Words, check_name, report::read_all_lvs};

/// A lock that somebody else holds is an error at once.
const AT_ONCE: &str = "backup/archive=0 global/wait_for_locks=0";

/// A snapshot that lvm2 is taking.
///
/// It is never killed for being late: lvm2 suspends the origin meanwhile, and nobody
/// would resume it.
pub struct Taking(Receiver<Result<(), LvmError>>);

impl Taking {
    /// Waits for its end, but not longer than this.
    ///
    /// # Errors
    /// What lvm2 said; or [`LvmError::Late`], and it goes on.
    pub fn ended_within(&self, patience: Duration) -> Result<(), LvmError> {
        match self.0.recv_timeout(patience) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => Err(LvmError::Late(patience)),
            Err(RecvTimeoutError::Disconnected) => {
                Err(LvmError::Report("lvm2 was not run".to_owned()))
            }
        }
    }

    /// Waits until nothing more is made.
    pub fn ended(self) {
        // What was told before is told once.
        let _ = self.0.recv();
    }
}

impl Vg {
    /// Makes a thin snapshot of a thin volume, tagged and active; one that exists
    /// already is taken as made.
    ///
    /// lvm2 suspends the origin meanwhile, so that the snapshot is of one moment:
    /// device-mapper waits until what is in flight there has ended, and lets wait
    /// what comes, above all from a handle on top (drivers/md/dm.c, `dm_suspend`).
    /// The thin pool flushes its data before it commits the snapshot
    /// (drivers/md/dm-thin.c, `metadata_pre_commit_callback`).
    ///
    /// # Errors
    /// [`LvmError::Taken`] if a logical volume of that name is of another origin or
    /// kind, or not ours; [`LvmError::Missing`] if there is no such origin.
    pub fn snapshot(&self, name: &str, origin: &str, origin_uuid: &str) -> Result<Lv, LvmError> {
        self.check()?;
        check_name(name)?;
        check_name(origin)?;
        let error = match self.run(&self.taking(name, origin)) {
            Ok(text) => return self.taken(&read_all_lvs(&text)?, name, origin_uuid),
            Err(error) => error,
        };
        let existing = read_all_lvs(&self.run(&[self.report()])?)?;
        if !existing.iter().any(|lv| lv.name == name) {
            if !existing.iter().any(|lv| lv.uuid == origin_uuid) {
                return Err(LvmError::Missing(origin.to_owned()));
            }
            return Err(error);
        }
        let lines = [self.activation(&[&self.thin_pool, name]), self.report()];
        self.taken(&read_all_lvs(&self.run(&lines)?)?, name, origin_uuid)
    }

    /// Begins one while consumers wait: a lock that somebody else holds is not waited
    /// for, a name that is taken is an error, and nothing else is asked of lvm2.
    ///
    /// # Errors
    /// A name that is not one; all else is told by what is returned.
    pub fn begin_snapshot(&self, name: &str, origin: &str) -> Result<Taking, LvmError> {
        self.check()?;
        check_name(name)?;
        check_name(origin)?;
        let (vg, line) = (self.clone(), self.taking_by(AT_ONCE, name, origin));
        let (tell, told) = sync_channel(1);
        thread::spawn(move || {
            // Nobody listens any more: then nobody has to know.
            let _ = tell.send(vg.run(&[line]).map(drop));
        });
        Ok(Taking(told))
    }

    /// The snapshot that was begun, once it has ended.
    ///
    /// # Errors
    /// As for [`Vg::snapshot`].
    pub fn begun(&self, name: &str, origin_uuid: &str) -> Result<Lv, LvmError> {
        self.taken(&read_all_lvs(&self.run(&[self.report()])?)?, name, origin_uuid)
    }

    pub(super) fn taking(&self, name: &str, origin: &str) -> Vec<Words> {
        vec![self.taking_by(NO_ARCHIVE, name, origin), self.report()]
    }

    fn taking_by(&self, settings: &str, name: &str, origin: &str) -> Words {
        let path = format!("{}/{origin}", self.name);
        let tag = ["--addtag", LVM_TAG];
        // A snapshot would be skipped by activation otherwise (-kn).
        let args = ["--noudevsync", "-y", "-qq", "-kn", "-n", name, tag[0], tag[1], "-s", &path];
        self.changing_by(settings, "lvcreate", &args)
    }

    /// The snapshot out of a report that must have it. Whoever is of another origin
    /// holds another volume's content.
    fn taken(&self, report: &[Lv], name: &str, origin_uuid: &str) -> Result<Lv, LvmError> {
        let lv = report
            .iter()
            .find(|lv| lv.name == name && lv.active)
            .ok_or_else(|| LvmError::Missing(name.to_owned()))?;
        let taken = |field| Err(LvmError::Taken { name: name.to_owned(), field });
        match () {
            () if !lv.tags.iter().any(|tag| tag == LVM_TAG) => taken("tag"),
            () if lv.pool_lv.as_deref() != Some(&self.thin_pool) => taken("kind"),
            () if lv.origin_uuid.as_deref() != Some(origin_uuid) => taken("origin"),
            () => Ok(lv.clone()),
        }
    }
}

#[cfg(test)]
mod test {
    use std::path::PathBuf;

    use super::*;

    fn vg() -> Vg {
        let devices = vec![PathBuf::from("/dev/vdb")];
        Vg { name: "vg0".to_owned(), devices, thin_pool: "pool".to_owned() }
    }

    #[test]
    fn a_snapshot_is_one_script_that_ends_with_the_report() {
        let name = "dmlocal-0b3f9a52-6c1e-4d7a-9f00-1234567890ab-g0";
        let text = super::super::script(&vg().taking(name, "origin")).unwrap();
        let line = text.lines().nth(1).unwrap();
        assert_eq!(
            line,
            format!(
                "lvcreate --devices /dev/vdb --config backup/archive=0 --noudevsync -y -qq -kn \
                 -n {name} --addtag dmlocal -s vg0/origin"
            )
        );
        assert!(text.lines().nth(2).unwrap().ends_with("origin_uuid vg0"));
    }

    #[test]
    fn a_snapshot_for_which_consumers_wait_waits_for_no_lock() {
        let line = vg().taking_by(AT_ONCE, "new", "origin");
        let settings: Vec<_> = line.windows(2).filter(|pair| pair[0] == "--config").collect();
        // lvm2 takes the option once.
        assert_eq!(settings.len(), 1);
        assert_eq!(settings[0][1], "backup/archive=0 global/wait_for_locks=0");
    }

    #[test]
    fn only_a_snapshot_of_the_right_origin_is_adopted() {
        let lv = |tag: &str, pool: Option<&str>, origin: Option<&str>| Lv {
            name: "s".to_owned(),
            uuid: "u".to_owned(),
            vg_uuid: "v".to_owned(),
            size: 4 << 20,
            tags: vec![tag.to_owned()],
            pool_lv: pool.map(str::to_owned),
            thin_id: Some(1),
            active: true,
            open: false,
            number: None,
            extent_size: 4 << 20,
            origin_uuid: origin.map(str::to_owned),
        };
        let field = |lv: Lv| match vg().taken(&[lv], "s", "right") {
            Err(LvmError::Taken { field, .. }) => field,
            Err(_) => "?",
            Ok(_) => "",
        };
        assert_eq!(field(lv(LVM_TAG, Some("pool"), Some("right"))), "");
        assert_eq!(field(lv("other", Some("pool"), Some("right"))), "tag");
        assert_eq!(field(lv(LVM_TAG, Some("other"), Some("right"))), "kind");
        assert_eq!(field(lv(LVM_TAG, Some("pool"), Some("wrong"))), "origin");
        assert_eq!(field(lv(LVM_TAG, Some("pool"), None)), "origin");
    }
}
