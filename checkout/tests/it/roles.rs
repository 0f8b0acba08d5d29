//! The table of who may call what is about every RPC of the contract, and about nothing else.

use std::collections::BTreeSet;

use prost::Message as _;
use prost_types::FileDescriptorSet;

#[test]
fn every_rpc_is_in_the_table() {
    let contract = FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap();
    let mut rpcs = BTreeSet::new();
    for file in &contract.file {
        for service in &file.service {
            let full = format!("{}.{}", file.package(), service.name());
            if full == "cart.Cart" {
                let names = service.method.iter().map(|method| method.name());
                rpcs.extend(names.map(|name| format!("/{full}/{name}")));
            }
        }
    }
    let table: Vec<_> = checkout::roles::METHODS
        .iter()
        .map(|(method, _)| (*method).to_owned())
        .collect();
    assert!(!rpcs.is_empty());
    assert_eq!(table.iter().cloned().collect::<BTreeSet<_>>(), rpcs);
    assert_eq!(table.len(), rpcs.len(), "one line for each");
}
