//! Connections to agents: a unix socket, or https with mutual TLS. There is no
//! plaintext TCP.

use std::{fmt, path::PathBuf, str::FromStr};

/// Where an agent listens.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Endpoint {
    /// A socket on this machine.
    Unix(PathBuf),
    /// Another machine, with mutual TLS.
    Https(String),
}

impl FromStr for Endpoint {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Endpoint, Self::Err> {
        if let Some(path) = text.strip_prefix("unix://") {
            if !path.starts_with('/') {
                return Err("the path of a unix:// endpoint is absolute: unix:///PATH");
            }
            return Ok(Endpoint::Unix(path.into()));
        }
        let uri: tonic::transport::Uri =
            text.parse().map_err(|_| "write unix:///PATH or https://HOST:PORT")?;
        match (uri.scheme_str(), uri.port_u16(), uri.path(), uri.query()) {
            (Some("https"), Some(_), "/", None) => {
                Ok(Endpoint::Https(text.trim_end_matches('/').to_owned()))
            }
            _ => Err("write unix:///PATH or https://HOST:PORT"),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Unix(path) => write!(f, "unix://{}", path.display()),
            Endpoint::Https(uri) => f.write_str(uri),
        }
    }
}
