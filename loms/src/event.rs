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
    /// Not of a step that an import made: histories hold no time for it.
    #[serde(rename = "OccurredAt", skip_serializing_if = "Option::is_none")]
    occurred_at: Option<String>,
}

/// The value of the Kafka message.
pub(crate) fn payload(row: &OutboxRow) -> String {
    let event = OrderEvent {
        user: row.user,
        order: row.order.0,
        status: row.status.as_str(),
        message: told(row.order, row.status),
        sequence: row.sequence,
        occurred_at: row.at.and_then(|at| at.format(&Rfc3339).ok()),
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
    use serde_json::Value;
    use time::OffsetDateTime;

    use super::*;

    #[test]
    fn an_event_is_its_fixture_to_the_byte() {
        for (status, fixture) in [
            (Status::New, include_str!("../../proto/events/new.json")),
            (
                Status::AwaitingPayment,
                include_str!("../../proto/events/awaiting_payment.json"),
            ),
            (
                Status::Failed,
                include_str!("../../proto/events/failed.json"),
            ),
            (Status::Payed, include_str!("../../proto/events/payed.json")),
            (
                Status::Cancelled,
                include_str!("../../proto/events/cancelled.json"),
            ),
        ] {
            let facts: Value = serde_json::from_str(fixture).unwrap();
            let at = OffsetDateTime::parse(facts["OccurredAt"].as_str().unwrap(), &Rfc3339);
            let row = OutboxRow {
                id: 1,
                order: OrderId(facts["OrderID"].as_i64().unwrap()),
                sequence: i32::try_from(facts["Sequence"].as_i64().unwrap()).unwrap(),
                traceparent: None,
                user: facts["UserId"].as_i64().unwrap(),
                status,
                at: Some(at.unwrap()),
            };
            assert_eq!(payload(&row), fixture.trim_end());
        }
    }
}
