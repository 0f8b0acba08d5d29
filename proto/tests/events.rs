//! The event fixtures: what LOMS puts into the topic `orders`, byte for byte, and what a consumer must accept from before.
//! LOMS's serialiser is compared with them in `loms`, the consumer reads them in `notifications`.

use std::{collections::BTreeMap, fs, path::Path};

use serde::{Deserialize, Serialize};

/// The keys as they are spelt on the wire, in their order.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Event {
    #[serde(rename = "UserId")]
    user: i64,
    #[serde(rename = "OrderID")]
    order: i64,
    #[serde(rename = "Status")]
    status: String,
    #[serde(rename = "Message")]
    message: String,
    #[serde(rename = "Sequence", skip_serializing_if = "Option::is_none")]
    sequence: Option<u32>,
    #[serde(rename = "OccurredAt", skip_serializing_if = "Option::is_none")]
    occurred_at: Option<String>,
}

/// Every status, its fixture and its place in an order's history.
const STATUSES: [(&str, &str, u32); 5] = [
    ("new.json", "new", 1),
    ("awaiting_payment.json", "awaiting payment", 2),
    ("failed.json", "failed", 2),
    ("payed.json", "payed", 3),
    ("cancelled.json", "cancelled", 3),
];

#[test]
fn the_five_events_have_exactly_the_keys_of_the_contract_in_its_order() {
    for (name, status, sequence) in STATUSES {
        let text = fixture(name);
        let event: Event =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(serde_json::to_string(&event).unwrap(), text, "{name}");
        assert_eq!(
            (event.status.as_str(), event.sequence),
            (status, Some(sequence)),
            "{name}"
        );
        assert!(
            event.user > 0 && event.order > 0 && !event.message.is_empty(),
            "{name}"
        );
        let at = event.occurred_at.unwrap();
        let read: pbjson_types::Timestamp = serde_json::from_value(at.clone().into()).unwrap();
        assert!(
            read.seconds > 0 && at.ends_with('Z'),
            "{name}: {at} is not RFC 3339 in UTC"
        );
    }
}

#[test]
fn events_from_before_the_additions_are_kept_as_fixtures_in_both_spellings() {
    let old = fixture("legacy.json");
    let event: Event = serde_json::from_str(&old).unwrap();
    assert_eq!((event.sequence, &event.occurred_at), (None, &None));
    assert_eq!(serde_json::to_string(&event).unwrap(), old);
    assert_eq!(
        fixture("legacy_user_id.json"),
        old.replace("\"UserId\"", "\"UserID\"")
    );
}

#[test]
fn poison_is_not_an_event() {
    let all = files("poison");
    assert!(all.len() >= 5, "{:?}", all.keys());
    for (name, bytes) in all {
        let result = serde_json::from_slice::<Event>(&bytes);
        let known = |event: &Event| {
            STATUSES
                .iter()
                .any(|(_, status, _)| *status == event.status)
        };
        assert!(
            !result
                .as_ref()
                .is_ok_and(|event| known(event) && event.user > 0 && event.order > 0),
            "{name}"
        );
    }
}

#[test]
fn no_fixture_is_left_out_of_these_tests() {
    let mut known: Vec<_> = STATUSES
        .iter()
        .map(|(name, ..)| *name)
        .chain(["legacy.json", "legacy_user_id.json"])
        .collect();
    known.sort_unstable();
    assert_eq!(files("").into_keys().collect::<Vec<_>>(), known);
}

fn fixture(name: &str) -> String {
    let bytes = files("")
        .remove(name)
        .unwrap_or_else(|| panic!("proto/events/{name} is not there"));
    String::from_utf8(bytes).unwrap().trim_end().to_owned()
}

fn files(folder: &str) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("events")
            .join(folder),
    )
    .unwrap();
    let paths = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file());
    paths
        .map(|path| {
            (
                path.file_name().unwrap().to_str().unwrap().to_owned(),
                fs::read(&path).unwrap(),
            )
        })
        .collect()
}
