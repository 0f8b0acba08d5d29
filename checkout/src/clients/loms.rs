//! LOMS: stock and orders. Every call here is idempotent (an order has its key), so UNAVAILABLE is tried again.

use std::{future::Future, time::Duration};

use platform::{client::Client, grpc::Deadline};
use proto::loms::{self as pb, loms_client::LomsClient};
use tonic::{Code, Request, Response, Status};

use super::{failure, retry, state};
use crate::{
    cart::Sku,
    error::Error,
    purchase::{OpenPurchase, Order, OrderId, OrderStatus, Shortage},
};

pub(super) const NAME: &str = "loms";

/// The client; clones share the connection.
#[derive(Clone)]
pub struct Loms {
    client: Client,
}

/// What LOMS made of an order.
pub enum Placement {
    /// It has it, under the purchase's key, now or since an earlier try.
    Placed(Order),
    /// It does not take it.
    Refused(String),
}

/// What became of a cancellation.
pub enum Cancellation {
    /// The order is cancelled.
    Done,
    /// The order is payed or failed.
    TooLate,
}

impl Loms {
    /// Calls go over `client`.
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// Units on sale over all warehouses.
    ///
    /// # Errors
    /// LOMS is away, busy or late.
    pub async fn units_on_sale(&self, sku: Sku, deadline: Deadline) -> Result<u64, Error> {
        let message = pb::StocksRequest { sku: sku.get() };
        let answer = self
            .ask(deadline, message, |mut stub, request| async move {
                stub.stocks(request).await
            })
            .await
            .map_err(|status| failure(NAME, &status))?;
        let units = answer.stocks.iter().map(|stock| stock.count);
        Ok(units.fold(0, u64::saturating_add))
    }

    /// Places the purchase's order, or finds the one that it has: the purchase's id is the key.
    ///
    /// # Errors
    /// LOMS is away, busy or late, and then nobody knows whether the order exists.
    pub async fn place(
        &self,
        purchase: &OpenPurchase,
        deadline: Deadline,
    ) -> Result<Placement, Error> {
        let items = purchase.lines.iter().map(|line| pb::OrderItem {
            sku: line.sku.get(),
            count: line.quantity.get(),
        });
        let message = pb::CreateOrderRequest {
            user: purchase.user.get(),
            items: items.collect(),
            idempotency_key: purchase.id.to_string(),
        };
        let answer = self
            .ask(deadline, message, |mut stub, request| async move {
                stub.create_order(request).await
            })
            .await;
        match answer {
            Ok(order) => read_order(order).map(Placement::Placed),
            Err(status) if status.code() == Code::InvalidArgument => {
                Ok(Placement::Refused(status.message().to_owned()))
            }
            Err(status) => Err(failure(NAME, &status)),
        }
    }

    /// Cancels an order that is not payed yet.
    ///
    /// # Errors
    /// LOMS is away, busy or late.
    pub async fn cancel(&self, order: OrderId, deadline: Deadline) -> Result<Cancellation, Error> {
        let message = pb::CancelOrderRequest { order_id: order.0 };
        let answer = self
            .ask(deadline, message, |mut stub, request| async move {
                stub.cancel_order(request).await
            })
            .await;
        match answer {
            Ok(_) => Ok(Cancellation::Done),
            Err(status) if status.code() == Code::FailedPrecondition => Ok(Cancellation::TooLate),
            Err(status) => Err(failure(NAME, &status)),
        }
    }

    /// The present status of an order.
    ///
    /// # Errors
    /// LOMS is away, busy or late, or has no such order.
    pub async fn status(&self, order: OrderId, deadline: Deadline) -> Result<OrderStatus, Error> {
        let message = pb::ListOrderRequest { order_id: order.0 };
        let answer = self
            .ask(deadline, message, |mut stub, request| async move {
                stub.list_order(request).await
            })
            .await
            .map_err(|status| failure(NAME, &status))?;
        read_status(&answer.status)
    }

    async fn ask<M, T, F>(
        &self,
        deadline: Deadline,
        message: M,
        call: impl Fn(LomsClient<Client>, Request<M>) -> F,
    ) -> Result<T, Status>
    where
        M: Clone,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let again =
            |status: &Status| (status.code() == Code::Unavailable).then_some(Duration::ZERO);
        let answer = retry(deadline, again, |deadline| {
            let stub = LomsClient::new(self.client.clone());
            let request = self.client.request(deadline, message.clone());
            self.client.call(deadline, call(stub, request))
        });
        answer.await.inspect(|_| state(NAME).works())
    }
}

fn read_order(answer: pb::CreateOrderResponse) -> Result<Order, Error> {
    let shortages = answer.shortages.into_iter().map(|short| Shortage {
        sku: short.sku,
        requested: short.requested,
        available: short.available,
    });
    Ok(Order {
        id: OrderId(answer.order_id),
        status: read_status(&answer.status)?,
        shortages: shortages.collect(),
    })
}

fn read_status(text: &str) -> Result<OrderStatus, Error> {
    OrderStatus::parse(text).ok_or_else(|| Error::NeighbourBroken {
        neighbour: NAME,
        cause: format!("an order of status {text:?}"),
    })
}
