//! The gRPC service: parse, one use case, reply.

use std::time::Duration;

use pbjson_types::{Empty, Timestamp};
use platform::{
    error::Fields,
    grpc::Deadline,
    peer::{self, is_authenticated},
    pg::Pool,
    tasks::Tasks,
    telemetry,
};
use proto::loms as pb;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use tonic::{Request, Response, Status as GrpcStatus};

use crate::{
    abandon::{self, Abandoned, Abandonment},
    allocation::Shortage,
    batch::{IdempotencyKey, NewOrder},
    delivery::{self, Delivery},
    error::Error,
    order::{Event, Lines, OrderId, Sku, UserId},
    orders::{self, Change},
    outbox::Relay,
    payments::Payments,
    placement::Placements,
    stock,
    store::orders::OrderRow,
};

/// Handles for the use cases; clones share them.
#[derive(Clone)]
pub(crate) struct LomsService {
    pub(crate) pool: Pool,
    /// Whether deliveries are booked for callers without a certificate too.
    pub(crate) open_to_unauthenticated: bool,
    /// Lines that an order may have before they are summed.
    pub(crate) max_lines: usize,
    /// How long idempotency keys are kept.
    pub(crate) keys_kept: Duration,
    pub(crate) placements: Placements,
    pub(crate) payments: Payments,
    pub(crate) relay: Relay,
    pub(crate) tasks: Tasks,
}

type Reply<T> = Result<Response<T>, GrpcStatus>;

#[tonic::async_trait]
impl pb::loms_server::Loms for LomsService {
    async fn create_order(
        &self,
        request: Request<pb::CreateOrderRequest>,
    ) -> Reply<pb::CreateOrderResponse> {
        let deadline = Deadline::of(&request);
        let order = new_order(request.into_inner(), self.max_lines)?;
        tracing::Span::current().record("user.id", order.user.get());
        let placed = self.placements.place(order, deadline).await?;
        tracing::Span::current().record("order.id", placed.order.0);
        Ok(Response::new(pb::CreateOrderResponse {
            order_id: placed.order.0,
            status: placed.status.to_string(),
            shortages: placed.shortages.into_iter().map(Into::into).collect(),
        }))
    }

    async fn list_order(
        &self,
        request: Request<pb::ListOrderRequest>,
    ) -> Reply<pb::ListOrderResponse> {
        let order = order_id(request.get_ref().order_id);
        Ok(Response::new(orders::list(&self.pool, order).await?.into()))
    }

    async fn order_payed(&self, request: Request<pb::OrderPayedRequest>) -> Reply<Empty> {
        let deadline = Deadline::of(&request);
        let order = order_id(request.get_ref().order_id);
        self.payments.pay(order, deadline).await?;
        Ok(Response::new(Empty {}))
    }

    async fn cancel_order(&self, request: Request<pb::CancelOrderRequest>) -> Reply<Empty> {
        let change = Change {
            order: order_id(request.get_ref().order_id),
            traceparent: telemetry::traceparent(),
        };
        let (pool, relay) = (self.pool.clone(), self.relay.clone());
        let work = async move { orders::change(&pool, &relay, &change, Event::Cancel).await };
        self.tasks
            .run("cancel", work)
            .await
            .map_err(|_| Error::Broken)??;
        Ok(Response::new(Empty {}))
    }

    async fn stocks(&self, request: Request<pb::StocksRequest>) -> Reply<pb::StocksResponse> {
        let mut fields = Fields::new();
        let sku = Sku::new(request.get_ref().sku);
        fields.check(sku.is_some(), "sku", "must not be 0");
        fields.finish().map_err(Error::Invalid)?;
        let found = match sku {
            Some(sku) => stock::on_sale(&self.pool, sku).await?,
            None => Vec::new(),
        };
        let stocks = found.into_iter().map(|(warehouse, count)| pb::Stock {
            warehouse_id: warehouse.get(),
            count,
        });
        Ok(Response::new(pb::StocksResponse {
            stocks: stocks.collect(),
        }))
    }

    async fn receive_stock(
        &self,
        request: Request<pb::ReceiveStockRequest>,
    ) -> Reply<pb::ReceiveStockResponse> {
        if !self.open_to_unauthenticated && !is_authenticated(&request) {
            return Err(Error::Stranger.into());
        }
        let booked_by = peer::caller(&request);
        let delivery = Delivery::try_from(request.into_inner())?;
        let pool = self.pool.clone();
        let work = async move { stock::receive(&pool, &delivery, &booked_by).await };
        let already_received = self
            .tasks
            .run("receive", work)
            .await
            .map_err(|_| Error::Broken)??;
        Ok(Response::new(pb::ReceiveStockResponse { already_received }))
    }

    async fn abandon_order(
        &self,
        request: Request<pb::AbandonOrderRequest>,
    ) -> Reply<pb::AbandonOrderResponse> {
        let what = abandonment(request.into_inner())?;
        tracing::Span::current().record("user.id", what.user.get());
        let (pool, relay, keep) = (self.pool.clone(), self.relay.clone(), self.keys_kept);
        let work = async move { abandon::abandon(&pool, &relay, keep, &what).await };
        let abandoned = self
            .tasks
            .run("abandon", work)
            .await
            .map_err(|_| Error::Broken)??;
        Ok(Response::new(abandoned.into()))
    }
}

/// Every number is the id of an order or of none, which is NOT_FOUND: ids come from us.
fn order_id(id: i64) -> OrderId {
    tracing::Span::current().record("order.id", id);
    OrderId(id)
}

fn new_order(request: pb::CreateOrderRequest, max_lines: usize) -> Result<NewOrder, Error> {
    let mut fields = Fields::new();
    let user = UserId::new(request.user);
    fields.check(user.is_some(), "user", "must be above 0");
    let count = request.items.len();
    let lines = if count > max_lines {
        // not looked at one by one: that is what the limit is for
        let text = format!("has {count} lines, at most {max_lines} are allowed");
        fields.push("items", text);
        None
    } else {
        let items = request.items.iter().map(|item| (item.sku, item.count));
        Lines::parse(&items.collect::<Vec<_>>(), &mut fields)
    };
    let key = Some(request.idempotency_key).filter(|key| !key.is_empty());
    let fine = key.as_deref().is_none_or(delivery::is_key);
    fields.check(
        fine,
        "idempotency_key",
        "must be 1 to 128 printable ASCII characters",
    );
    match (fields.finish(), user, lines) {
        (Ok(()), Some(user), Some(lines)) => {
            let key = key.map(|key| IdempotencyKey {
                key,
                body_hash: body_hash(user, &lines),
            });
            Ok(NewOrder {
                user,
                lines,
                key,
                traceparent: telemetry::traceparent(),
            })
        }
        (Err(violations), ..) => Err(Error::Invalid(violations)),
        (Ok(()), ..) => Err(Error::Broken),
    }
}

fn abandonment(request: pb::AbandonOrderRequest) -> Result<Abandonment, Error> {
    let mut fields = Fields::new();
    let user = UserId::new(request.user);
    fields.check(user.is_some(), "user", "must be above 0");
    let is_key = delivery::is_key(&request.idempotency_key);
    fields.check(
        is_key,
        "idempotency_key",
        "must be 1 to 128 printable ASCII characters",
    );
    let first_tried_at = request.first_tried_at.and_then(instant);
    fields.check(first_tried_at.is_some(), "first_tried_at", "must be a time");
    match (fields.finish(), user, first_tried_at) {
        (Ok(()), Some(user), Some(first_tried_at)) => Ok(Abandonment {
            user,
            key: request.idempotency_key,
            first_tried_at,
            traceparent: telemetry::traceparent(),
        }),
        (Err(violations), ..) => Err(Error::Invalid(violations)),
        (Ok(()), ..) => Err(Error::Broken),
    }
}

impl From<Abandoned> for pb::AbandonOrderResponse {
    fn from(abandoned: Abandoned) -> pb::AbandonOrderResponse {
        use pb::abandon_order_response::Outcome;
        let outcome = match abandoned {
            Abandoned::Nothing => Outcome::Abandoned(Empty {}),
            Abandoned::Order {
                id,
                status,
                shortages,
            } => Outcome::Order(pb::AbandonedOrder {
                order_id: id.0,
                status: status.to_string(),
                shortages: shortages.into_iter().map(Into::into).collect(),
            }),
        };
        pb::AbandonOrderResponse {
            outcome: Some(outcome),
        }
    }
}

/// Of the user and the summed lines, never of wire bytes: another client may write the same order differently.
fn body_hash(user: UserId, lines: &Lines) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(user.get().to_be_bytes());
    for (sku, quantity) in lines.iter() {
        hash.update(sku.get().to_be_bytes());
        hash.update(quantity.get().to_be_bytes());
    }
    hash.finalize().into()
}

impl TryFrom<pb::ReceiveStockRequest> for Delivery {
    type Error = Error;

    fn try_from(request: pb::ReceiveStockRequest) -> Result<Delivery, Error> {
        let lines = request
            .lines
            .into_iter()
            .map(|line| (line.warehouse_id, line.sku, line.count));
        Delivery::parse(&request.delivery_id, lines, |index| {
            format!("lines[{index}]")
        })
        .map_err(Error::Invalid)
    }
}

impl From<Shortage> for pb::Shortage {
    fn from(shortage: Shortage) -> pb::Shortage {
        pb::Shortage {
            sku: shortage.sku.get(),
            requested: shortage.requested,
            available: shortage.available,
        }
    }
}

impl From<OrderRow> for pb::ListOrderResponse {
    fn from(order: OrderRow) -> pb::ListOrderResponse {
        let items = order.items.into_iter().map(|(sku, count)| pb::OrderItem {
            sku: sku.get(),
            count,
        });
        let history = order.history.into_iter().map(|change| pb::StatusChange {
            sequence: change.sequence.cast_unsigned(),
            from_status: change.from,
            status: change.status,
            actor: change.actor,
            at: change.at.map(timestamp),
        });
        pb::ListOrderResponse {
            status: order.status.to_string(),
            user: order.user,
            items: items.collect(),
            created_at: order.created_at.map(timestamp),
            payment_deadline: order.payment_deadline.map(timestamp),
            history: history.collect(),
        }
    }
}

fn instant(at: Timestamp) -> Option<OffsetDateTime> {
    let seconds = OffsetDateTime::from_unix_timestamp(at.seconds).ok()?;
    seconds
        .replace_nanosecond(u32::try_from(at.nanos).ok()?)
        .ok()
}

fn timestamp(at: OffsetDateTime) -> Timestamp {
    Timestamp {
        seconds: at.unix_timestamp(),
        nanos: at.nanosecond().cast_signed(),
    }
}
