//! Generates the messages, clients and servers, and the descriptor set that the
//! reflection service answers from.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=dmlocal");
    let files = protox::compile(["dmlocal/v1/dmlocal.proto"], ["."])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    fs::write(out.join("dmlocal.bin"), files.encode_to_vec())?;
    tonic_prost_build::configure()
        .message_attribute(".", "#[derive(serde::Serialize)]")
        .field_attribute(
            "dmlocal.v1.Volume.state",
            "#[serde(serialize_with = \"crate::serialize_state\")]",
        )
        .field_attribute(
            "dmlocal.v1.Snapshot.state",
            "#[serde(serialize_with = \"crate::serialize_snapshot_state\")]",
        )
        .compile_fds(files)?;
    Ok(())
}
