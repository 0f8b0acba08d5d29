//! Holds the requests that have a route against the reader of JSON: a new field of a kind that it
//! does not read would be refused for ever.

use platform::json;
use prost_reflect::{DescriptorPool, Kind, MessageDescriptor};
use serde_json::{Value, json};

/// Has every field of `message`, and of the messages in it, refused as what it is not.
fn assert_known(message: &MessageDescriptor) {
    // no kind of field takes an array in an array
    let fields = message.fields();
    let fields = fields.map(|field| (field.json_name().to_owned(), json!([[]])));
    let body = Value::Object(fields.collect()).to_string();
    let refused = json::read::<()>(message, body.as_bytes()).unwrap_err();
    let said = format!("{refused:?}");
    let name = message.full_name();
    assert!(!said.contains("cannot be sent as JSON"), "{name}: {said}");
    for field in message.fields() {
        if let Kind::Message(inner) = field.kind() {
            assert_known(&inner);
        }
    }
}

#[test]
fn every_field_of_a_request_can_be_sent() {
    let contract = DescriptorPool::decode(proto::DESCRIPTORS).unwrap();
    let rows = include_str!("../routes.txt").lines();
    for row in rows.filter(|row| !row.is_empty() && !row.starts_with('#')) {
        let method = row.split_whitespace().last().unwrap();
        let (service, name) = method[1..].split_once('/').unwrap();
        let service = contract.get_service_by_name(service).unwrap();
        let method = service.methods().find(|method| method.name() == name);
        assert_known(&method.unwrap().input());
    }
}
