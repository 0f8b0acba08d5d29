//! The roles table has every RPC of the contract, once, and nothing else.

use std::collections::BTreeSet;

#[test]
fn every_rpc_is_in_the_table() {
    let table = checkout::roles::METHODS
        .iter()
        .map(|(method, _)| (*method).to_owned());
    let table: Vec<_> = table.collect();
    let rpcs = testkit::rpcs("cart.Cart");
    assert_eq!(table.iter().cloned().collect::<BTreeSet<_>>(), rpcs);
    assert_eq!(table.len(), rpcs.len(), "one line for each");
}
