//! An order event as Kafka carries it; `proto/events/` has one of each.

use serde::Serialize;
use time::format_description::well_known::Rfc3339;

use crate::{
    order::{OrderId, Status},
    store::outbox::OutboxRow,
};

/// The event as consumers read it; `Sequence` and `OccurredAt` were added to the original three fields and message.
#[derive(Serialize)]
struct OrderEvent<'a> {
    #[serde(rename = "UserId")]
    user: i64,
    #[serde(rename = "OrderID")]
    order: i64,
    #[serde(rename = "Status")]
    status: &'a str,
    #[serde(rename = "Message")]
    message: String,
    #[serde(rename = "Sequence")]
    sequence: i32,
    #[serde(rename = "OccurredAt")]
    occurred_at: String,
}

/// The value of the Kafka message.
pub(crate) fn payload(row: &OutboxRow) -> String {
    let event = OrderEvent {
        user: row.user,
        order: row.order.0,
        status: row.status.as_str(),
        message: told(row.order, row.status),
        sequence: row.sequence,
        occurred_at: row.at.format(&Rfc3339).unwrap_or_default(),
    };
    // a struct of text and numbers always serialises
    serde_json::to_string(&event).unwrap_or_default()
}

/// What the user is told: which order, what happened, what next.
fn told(OrderId(order): OrderId, status: Status) -> String {
    match status {
        Status::New => format!("Order {order} is received. We are reserving its goods."),
        Status::AwaitingPayment => {
            format!("Order {order} is reserved. Please pay for it before its deadline.")
        }
        Status::Failed => format!(
            "Order {order} could not be reserved: some goods are out of stock. Nothing is due."
        ),
        Status::Payed => format!("Order {order} is paid. We are preparing it."),
        Status::Cancelled => {
            format!("Order {order} is cancelled. Its goods are back on sale and nothing is due.")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use time::macros::datetime;

    use super::*;

    #[test]
    fn an_event_reads_like_its_fixture() {
        for (status, sequence, fixture) in [
            (Status::New, 1, include_str!("../../proto/events/new.json")),
            (
                Status::AwaitingPayment,
                2,
                include_str!("../../proto/events/awaiting_payment.json"),
            ),
            (
                Status::Failed,
                2,
                include_str!("../../proto/events/failed.json"),
            ),
            (
                Status::Payed,
                3,
                include_str!("../../proto/events/payed.json"),
            ),
            (
                Status::Cancelled,
                3,
                include_str!("../../proto/events/cancelled.json"),
            ),
        ] {
            let fixture: serde_json::Value = serde_json::from_str(fixture).unwrap();
            let row = OutboxRow {
                id: 1,
                order: OrderId(fixture["OrderID"].as_i64().unwrap()),
                sequence,
                traceparent: None,
                user: fixture["UserId"].as_i64().unwrap(),
                status,
                at: datetime!(2026-01-01 00:00 UTC),
            };
            let made: serde_json::Value = serde_json::from_str(&payload(&row)).unwrap();
            assert_eq!(made["Status"], fixture["Status"]);
            assert_eq!(made["Sequence"], fixture["Sequence"]);
            let keys = |value: &serde_json::Value| {
                value
                    .as_object()
                    .unwrap()
                    .keys()
                    .cloned()
                    .collect::<HashSet<_>>()
            };
            assert_eq!(keys(&made), keys(&fixture));
        }
    }
}
