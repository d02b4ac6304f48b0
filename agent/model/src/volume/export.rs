//! What a copy is exported as.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::name::NQN_PREFIX;

/// Identity of an export; random per grant and never used again, so that a
/// late replay of an old connection meets nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportName {
    /// NQN of the subsystem.
    pub subsystem_nqn: String,
    /// UUID of the namespace.
    pub namespace_uuid: Uuid,
    /// NGUID of the namespace.
    pub namespace_nguid: Uuid,
    /// Address on which it listens.
    pub address: String,
    /// TCP port on which it listens; one export a port.
    pub port: u16,
}

impl ExportName {
    /// Stands for the export that a grant is going to have: nothing is ever exported by
    /// this name, because a grant's id is not that of any export.
    pub fn unknown(grant: Uuid) -> Self {
        Self {
            subsystem_nqn: format!("{NQN_PREFIX}{grant}"),
            namespace_uuid: grant,
            namespace_nguid: grant,
            address: "0.0.0.0".to_owned(),
            port: 0,
        }
    }
}
