//! The contract, as the tests of a service hold its own tables against it.

use std::collections::BTreeSet;

use prost::Message as _;
use prost_types::FileDescriptorSet;

/// The full path of every RPC of a service, `loms.Loms` say, as the descriptors have them.
///
/// # Panics
/// If the contract has no such service.
pub fn rpcs(service: &str) -> BTreeSet<String> {
    let contract = FileDescriptorSet::decode(proto::DESCRIPTORS).expect("descriptors");
    let mut rpcs = BTreeSet::new();
    for file in &contract.file {
        for found in &file.service {
            if format!("{}.{}", file.package(), found.name()) == service {
                let names = found.method.iter().map(|method| method.name());
                rpcs.extend(names.map(|name| format!("/{service}/{name}")));
            }
        }
    }
    assert!(!rpcs.is_empty(), "{service} is not in the contract");
    rpcs
}
