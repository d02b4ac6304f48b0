//! The configuration file: read once, checked once, then plain values.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// Where the file is unless the command line says otherwise.
pub const DEFAULT_PATH: &str = "/etc/dmlocal/dmlocald.toml";

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this node: the host name that Nova's connector reports.
    pub node: String,
    /// Directory of the journal.
    #[serde(default = "default_state")]
    pub state: PathBuf,
    /// Where the interface listens.
    #[serde(default)]
    pub listen: Listen,
    /// Certificates; without them there is no TCP listener and no move.
    pub tls: Option<Tls>,
    /// Where exports listen; without it volumes cannot be moved from here.
    pub export: Option<Export>,
    /// Through how many nodes a volume may be read while it moves on before it
    /// has arrived.
    #[serde(default = "default_max_chain")]
    pub max_chain: u32,
    /// How copies that come here share the node.
    #[serde(default)]
    pub hydration: Hydration,
    /// What becomes of volumes that are received.
    #[serde(default)]
    pub receive: Receive,
    /// Where space comes from.
    #[serde(default, rename = "pool")]
    pub pools: Vec<Pool>,
}

/// What becomes of volumes that are received.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receive {
    /// What to do with one for which there is no room.
    #[serde(default)]
    pub when_full: WhenFull,
    /// Volumes of more bytes than this are never copied here; none for no limit.
    pub always_remote_above_bytes: Option<u64>,
    /// Whether volumes that are remote for want of room are copied here as soon as
    /// there is some.
    #[serde(default = "yes")]
    pub localize_by_itself: bool,
}

impl Default for Receive {
    fn default() -> Self {
        Self {
            when_full: WhenFull::default(),
            always_remote_above_bytes: None,
            localize_by_itself: yes(),
        }
    }
}

/// What to do with a received volume for which there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// Refuse it.
    #[default]
    Refuse,
    /// Use it without a copy here.
    Remote,
}

/// Where the interface listens.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// Unix socket, for root only.
    #[serde(default = "default_unix")]
    pub unix: PathBuf,
    /// TCP address, mutual TLS only.
    pub tcp: Option<SocketAddr>,
    /// URL by which other nodes reach the TCP listener.
    pub advertise: Option<String>,
}

impl Default for Listen {
    fn default() -> Self {
        Self { unix: default_unix(), tcp: None, advertise: None }
    }
}

/// Certificates, PEM.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The authority that every peer's certificate must come from.
    pub ca: PathBuf,
    /// This node's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Where exports listen.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// Address of this node in the storage network.
    pub address: IpAddr,
    /// TCP ports `FIRST-LAST`, one for each export.
    #[serde(default)]
    pub ports: Ports,
}

/// A range of TCP ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Ports {
    /// First port.
    pub first: u16,
    /// Last port, included.
    pub last: u16,
}

impl Default for Ports {
    /// From NVMe/TCP's registered port (IANA 4420) on.
    fn default() -> Self {
        Self { first: 4420, last: 4519 }
    }
}

impl TryFrom<String> for Ports {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let ports = text.split_once('-').and_then(|(first, last)| {
            Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
        });
        match ports {
            Some((first, last)) if first > 0 && first <= last => Ok(Self { first, last }),
            _ => Err(format!("`{text}` is not a range of ports such as `4420-4519`")),
        }
    }
}

/// How copies that come here share the node.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hydration {
    /// How many run at once, 1 to 1000; the others wait for their turn.
    pub at_once: usize,
    /// How many of them from one source, 1 to 1000.
    pub per_source: usize,
    /// Bytes per second of all together; 0 is no limit.
    pub rate_bytes_per_s: u64,
    /// How much of the time consumers may wait so that a copy which they keep from going
    /// on does, in percent, 0 to 50; 0 leaves it to the gaps that they leave.
    pub push_percent: u32,
}

impl Default for Hydration {
    /// Few enough to leave a source's disks and network to its own guests.
    fn default() -> Self {
        Self { at_once: 4, per_source: 2, rate_bytes_per_s: 0, push_percent: 12 }
    }
}

/// An LVM thin pool.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// What callers name.
    pub name: String,
    /// The LVM volume group.
    pub volume_group: String,
    /// The thin pool's logical volume in it.
    pub thin_pool: String,
    /// The group's physical volumes: the only devices that LVM may look at on
    /// our behalf, so that it never sees what guests have made of their disks.
    pub devices: Vec<PathBuf>,
    /// How many times its size may be promised to volumes. Above 1, a full pool
    /// fails writes.
    #[serde(default = "default_overprovisioning")]
    pub overprovisioning: f64,
    /// Percent of the pool in use at which copying rests.
    #[serde(default = "default_high_water")]
    pub high_water_percent: f64,
}

const fn yes() -> bool {
    true
}

const fn default_max_chain() -> u32 {
    4
}

fn default_state() -> PathBuf {
    "/var/lib/dmlocal".into()
}

fn default_unix() -> PathBuf {
    "/run/dmlocal/agent.sock".into()
}

const fn default_overprovisioning() -> f64 {
    1.0
}

const fn default_high_water() -> f64 {
    95.0
}

/// What is wrong with a configuration file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML of the right form.
    #[error("{0}")]
    Parse(Box<toml::de::Error>),
    /// A value makes no sense.
    #[error("{field}: {problem}")]
    Value {
        /// Where.
        field: String,
        /// What.
        problem: String,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// Names the first thing that is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text)
    }

    /// The same from text.
    ///
    /// # Errors
    /// Names the first thing that is wrong.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self =
            toml::from_str(text).map_err(|error| ConfigError::Parse(Box::new(error)))?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |field: &str, problem: &str| {
            Err(ConfigError::Value { field: field.to_owned(), problem: problem.to_owned() })
        };
        if !is_host_name(&self.node) {
            return wrong("node", "must be a host name");
        }
        if self.listen.tcp.is_some() && self.tls.is_none() {
            return wrong("listen.tcp", "needs a [tls] section: there is no plaintext listener");
        }
        if self.listen.tcp.is_some() && self.listen.advertise.is_none() {
            return wrong("listen.advertise", "is needed with listen.tcp");
        }
        if let Some(url) = &self.listen.advertise
            && !url.starts_with("https://")
        {
            return wrong("listen.advertise", "must be an https:// URL");
        }
        if self.export.as_ref().is_some_and(|export| export.address.is_unspecified()) {
            return wrong("export.address", "must be the address that other nodes connect to");
        }
        if !(1..=16).contains(&self.max_chain) {
            return wrong("max_chain", "must be 1 to 16");
        }
        for (field, count) in [
            ("hydration.at_once", self.hydration.at_once),
            ("hydration.per_source", self.hydration.per_source),
        ] {
            if !(1..=1000).contains(&count) {
                return wrong(field, "must be 1 to 1000");
            }
        }
        if self.hydration.push_percent > 50 {
            return wrong("hydration.push_percent", "must be 0 to 50");
        }
        if self.receive.always_remote_above_bytes == Some(0) {
            return wrong(
                "receive.always_remote_above_bytes",
                "must be at least 1: a node without a pool keeps everything remote",
            );
        }
        let mut names = BTreeSet::new();
        for pool in &self.pools {
            if !is_lvm_name(&pool.name) || !names.insert(&pool.name) {
                return wrong(
                    "pool.name",
                    "must be unique, of letters, digits, `_`, `.`, `+`, `-`",
                );
            }
            if !is_lvm_name(&pool.volume_group) {
                return wrong("pool.volume_group", "is not a name that LVM accepts");
            }
            if !is_lvm_name(&pool.thin_pool) {
                return wrong("pool.thin_pool", "is not a name that LVM accepts");
            }
            if pool.devices.is_empty() || !pool.devices.iter().all(|path| path.is_absolute()) {
                return wrong("pool.devices", "must list the group's devices by absolute path");
            }
            if !(1.0..=100.0).contains(&pool.overprovisioning) {
                return wrong("pool.overprovisioning", "must be 1 to 100");
            }
            if !(10.0..=100.0).contains(&pool.high_water_percent) {
                return wrong("pool.high_water_percent", "must be 10 to 100");
            }
        }
        Ok(())
    }

    /// The configured pool of that name; without a name the first.
    pub fn pool(&self, name: &str) -> Option<&Pool> {
        if name.is_empty() {
            return self.pools.first();
        }
        self.pools.iter().find(|pool| pool.name == name)
    }
}

fn is_host_name(text: &str) -> bool {
    (1..=253).contains(&text.len())
        && text.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        })
}

/// `man 8 lvm`, VALID NAMES.
fn is_lvm_name(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && !text.starts_with('-')
        && text != "."
        && text != ".."
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte))
}

#[cfg(test)]
mod test {
    use super::Config;

    const GOOD: &str = r#"
        node = "node-a"
        [listen]
        tcp = "0.0.0.0:7450"
        advertise = "https://node-a:7450"
        [tls]
        ca = "/ca"
        cert = "/cert"
        key = "/key"
        [export]
        address = "127.0.0.1"
        ports = "4420-4430"
        [[pool]]
        name = "local"
        volume_group = "vg"
        thin_pool = "pool"
        devices = ["/dev/x"]
    "#;

    #[test]
    fn a_complete_file_is_accepted() {
        let config = Config::parse(GOOD).unwrap();
        assert_eq!(config.pool("").unwrap().name, "local");
        assert!(config.pool("other").is_none());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, named) in [
            ("node = \"node-a\"", "nodename = \"a\"", "nodename"),
            ("node-a\"", "-a\"", "node"),
            ("[tls]\n", "[tsl]\n", "tsl"),
            ("https://node-a", "http://node-a", "listen.advertise"),
            ("4420-4430", "4430-4420", "range of ports"),
            ("address = \"127.0.0.1\"", "address = \"0.0.0.0\"", "export.address"),
            ("volume_group = \"vg\"", "volume_group = \"--config\"", "pool.volume_group"),
            ("/dev/x", "x", "pool.devices"),
            ("[[pool]]", "[hydration]\nat_once = 0\n[[pool]]", "hydration.at_once"),
            ("[[pool]]", "[hydration]\nper_source = 1001\n[[pool]]", "hydration.per_source"),
            ("[[pool]]", "[hydration]\nrate = 5\n[[pool]]", "rate"),
            ("[[pool]]", "[hydration]\npush_percent = 51\n[[pool]]", "hydration.push_percent"),
            ("[[pool]]", "[hydration]\nrate_bytes_per_s = -1\n[[pool]]", "rate_bytes_per_s"),
            ("[tls]", "[receive]\nwhen_full = \"wait\"\n[tls]", "when_full"),
            ("[tls]", "[receive]\nalways_remote_above_bytes = 0\n[tls]", "receive.always"),
            ("[tls]", "[receive]\nalways_remote_above_bytes = -1\n[tls]", "always_remote"),
            ("[tls]", "[receive]\nlocalize = true\n[tls]", "localize"),
            ("thin_pool = \"pool\"", "thin_pool = \"pool\"\noverprovisioning = 0.5", "overprov"),
        ] {
            let text = GOOD.replacen(from, to, 1);
            assert_ne!(text, GOOD, "{from}");
            let error = Config::parse(&text).unwrap_err().to_string();
            assert!(error.contains(named), "{error} does not name {named}");
        }
    }

    #[test]
    fn there_is_no_plaintext_listener() {
        let (before, after) = GOOD.split_once("[tls]").unwrap();
        let (_, after) = after.split_once("[export]").unwrap();
        let error = Config::parse(&format!("{before}[export]{after}")).unwrap_err();
        assert!(error.to_string().contains("[tls]"), "{error}");
    }
}
