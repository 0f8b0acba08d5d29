//! Compiles the contract without protoc: messages and gRPC stubs by tonic-prost, proto3 JSON by pbjson.

#[path = "build/openapi.rs"]
mod openapi;

use std::{error::Error, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 4] = [
    "cart.proto",
    "loms.proto",
    "notifications.proto",
    "product.proto",
];
const PACKAGES: [&str; 4] = [".cart", ".loms", ".notifications", ".route256.product"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=api");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let descriptors = protox::compile(FILES, ["api"])?;
    let encoded = descriptors.encode_to_vec();
    fs::write(out.join("descriptors.bin"), &encoded)?;

    // a JSON route finds its request's descriptor by the name
    let mut named = tonic_prost_build::Config::new();
    named.enable_type_names();
    tonic_prost_build::configure()
        .compile_well_known_types(true)
        .extern_path(".google.protobuf", "::pbjson_types")
        .compile_fds_with_config(descriptors, named)?;

    // the JSON of grpc-gateway v2: defaults present in a response, unknown fields of a request ignored
    pbjson_build::Builder::new()
        .register_descriptors(&encoded)?
        .emit_fields()
        .ignore_unknown_fields()
        .build(&PACKAGES)?;
    for package in PACKAGES {
        let file = out.join(format!("{}.serde.rs", &package[1..]));
        fs::write(&file, write_unset_messages(&fs::read_to_string(&file)?))?;
    }
    openapi::write(&FILES, &out)?;
    Ok(())
}

/// pbjson leaves an unset message out of a response even with `emit_fields`; clients rely on its
/// `null`. The contract has no `optional` scalar, which grpc-gateway does leave out, as it does
/// what of a `oneof` is not set.
fn write_unset_messages(generated: &str) -> String {
    const SET: &str = "if let Some(v) = self.";
    let mut lines = Vec::new();
    let mut rest = generated.lines().peekable();
    while let Some(line) = rest.next() {
        let is_oneof = rest.peek().is_some_and(|next| next.trim() == "match v {");
        let code = if is_oneof { "" } else { line.trim_start() };
        match code
            .strip_prefix(SET)
            .and_then(|rest| rest.strip_suffix(".as_ref() {"))
        {
            Some(field) => lines.push(format!("{{ let v = &crate::json::Field(&self.{field});")),
            None => lines.push(line.to_owned()),
        }
    }
    lines.join("\n")
}
