//! The gRPC interface of dmlocald: generated messages, clients and servers.
//!
//! JSON made from the messages has the proto's field names as keys and the bare
//! lower-case words of [`state_word`] as states.

use serde::Serializer;

/// Version 1 of the interface.
#[allow(
    missing_docs,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the .proto has the comments"
)]
pub mod v1 {
    tonic::include_proto!("dmlocal.v1");
}

/// The encoded descriptor set, for the reflection service.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dmlocal.bin"));

/// Newest version of the agent-to-agent interface that this code speaks.
pub const API_VERSION: u32 = 1;

/// Oldest version of the agent-to-agent interface that this code accepts from a
/// peer: always the one before [`API_VERSION`], once there is one.
pub const OLDEST_API_VERSION: u32 = 1;

/// Value of `ErrorInfo.domain` in every error of dmlocald.
pub const ERROR_DOMAIN: &str = "dmlocal";

/// The word of a state in tables and JSON: the enum's name in lower case
/// without its prefix; a state this code does not know is `unknown`.
pub fn state_word(state: i32) -> String {
    match v1::VolumeState::try_from(state) {
        Ok(v1::VolumeState::Unspecified) | Err(_) => "unknown".to_owned(),
        Ok(known) => known.as_str_name().trim_start_matches("VOLUME_STATE_").to_ascii_lowercase(),
    }
}

fn serialize_state<S: Serializer>(state: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&state_word(*state))
}

/// The same for the state of a snapshot.
pub fn snapshot_state_word(state: i32) -> String {
    match v1::SnapshotState::try_from(state) {
        Ok(v1::SnapshotState::Unspecified) | Err(_) => "unknown".to_owned(),
        Ok(known) => known.as_str_name().trim_start_matches("SNAPSHOT_STATE_").to_ascii_lowercase(),
    }
}

fn serialize_snapshot_state<S: Serializer>(state: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&snapshot_state_word(*state))
}

#[cfg(test)]
mod test {
    use super::{
        snapshot_state_word, state_word,
        v1::{SnapshotState, VolumeState},
    };

    #[test]
    fn states_are_bare_words() {
        assert_eq!(state_word(VolumeState::Hydrating as i32), "hydrating");
        assert_eq!(state_word(0), "unknown");
        assert_eq!(state_word(99), "unknown");
        assert_eq!(snapshot_state_word(SnapshotState::Available as i32), "available");
        assert_eq!(snapshot_state_word(99), "unknown");
    }
}
