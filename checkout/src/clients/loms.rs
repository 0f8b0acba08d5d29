//! LOMS: stock and orders. Every call here is idempotent (an order has its key), so UNAVAILABLE is
//! tried again; but not towards a LOMS that ignores keys, as the system before this one does: there
//! an order may be sent once. Each connection is asked which one is at its other end.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use platform::{client::Client, grpc::Deadline, state_log::StateLog};
use proto::loms::{self as pb, loms_client::LomsClient};
use tokio::sync::{Mutex, OnceCell};
use tonic::{Code, Request, Response, Status};

use super::{failure, reason, retry, state};
use crate::{
    cart::{Sku, UserId},
    error::Error,
    purchase::{OpenPurchase, Order, OrderId, OrderStatus, Shortage},
};

pub(super) const NAME: &str = "loms";

static IGNORES_KEYS: StateLog = StateLog::new(
    "loms ignores idempotency keys, an order is sent to it once at most",
    "loms keeps idempotency keys again",
);

/// The client; clones share the connection.
#[derive(Clone)]
pub struct Loms {
    client: Client,
    connection: Arc<Mutex<Option<Connection>>>,
    ignores_keys: Arc<AtomicBool>,
}

/// One connection, and what its other end makes of keys, once that was asked.
#[derive(Clone)]
struct Connection {
    client: Client,
    keys: Arc<OnceCell<Keys>>,
}

/// What a LOMS makes of idempotency keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// The same key gives the same order.
    Kept,
    /// Each CreateOrder makes another order, each CancelOrder may give stock back.
    Ignored,
}

/// Asked before a call that a LOMS that ignores keys may be sent once: whether it may be sent.
pub type Permit<'a> = &'a (dyn Fn(Keys) -> BoxFuture<'a, Result<bool, Error>> + Send + Sync);

/// What LOMS made of an order.
pub enum Placement {
    /// It has it, under the purchase's key, now or since an earlier try.
    Placed(Order),
    /// It has it, and does not say how it stands.
    Made(OrderId),
    /// It does not take it.
    Refused(String),
    /// The order was not sent: LOMS ignores keys and may have been asked before, or the key was
    /// given up.
    NotSent,
}

/// What became of a cancellation.
pub enum Cancellation {
    /// The order is cancelled.
    Done,
    /// The order is payed or failed.
    TooLate,
    /// LOMS was not asked: it ignores keys, and may have been asked before.
    NotSent,
}

/// A call that may have to be refrained from.
enum Tried<T> {
    Answered(T),
    Refrained,
    Failed(Error),
}

impl Connection {
    /// A call without a key: who keeps keys misses it.
    async fn keys(&self, deadline: Deadline) -> Result<Keys, Status> {
        let ask = || async {
            let request = self
                .client
                .request(deadline, pb::AbandonOrderRequest::default());
            let mut stub = LomsClient::new(self.client.clone());
            let answer = self.client.call(deadline, stub.abandon_order(request));
            match answer.await {
                Ok(_) => Ok(Keys::Kept),
                Err(status) => match status.code() {
                    Code::InvalidArgument => Ok(Keys::Kept),
                    // one of ours, of a release that does not know it: only ours has roles
                    Code::PermissionDenied if reason(&status) == "ROLE_REQUIRED" => Ok(Keys::Kept),
                    Code::Unimplemented => Ok(Keys::Ignored),
                    _ => Err(status),
                },
            }
        };
        // another caller may be asking, and have more time
        let known = self.client.call(deadline, async {
            self.keys
                .get_or_try_init(ask)
                .await
                .copied()
                .map(Response::new)
        });
        match known.await? {
            Keys::Kept => Ok(Keys::Kept),
            // asked each time, so that an order is not sent, for the one time, over a connection
            // that is dead and does not know it yet
            Keys::Ignored => ask().await,
        }
    }
}

impl Loms {
    /// Calls go over `client`.
    pub fn new(client: Client) -> Self {
        Self {
            client,
            connection: Arc::default(),
            ignores_keys: Arc::default(),
        }
    }

    /// Whether the LOMS that was asked last ignores keys.
    pub fn ignores_keys(&self) -> bool {
        self.ignores_keys.load(Ordering::Relaxed)
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
    /// `permit` is asked before each try.
    ///
    /// # Errors
    /// LOMS is unavailable, busy or late: the order may exist or not. Or the error of `permit`.
    pub async fn place(
        &self,
        purchase: &OpenPurchase,
        deadline: Deadline,
        permit: Permit<'_>,
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
            .ask_if(deadline, message, permit, |mut stub, request| async move {
                stub.create_order(request).await
            })
            .await;
        match answer {
            Ok(Tried::Answered(order)) if order.status.is_empty() => {
                Ok(Placement::Made(OrderId(order.order_id)))
            }
            Ok(Tried::Answered(order)) => read_order(order).map(Placement::Placed),
            Ok(Tried::Refrained) => Ok(Placement::NotSent),
            Ok(Tried::Failed(error)) => Err(error),
            Err(status) if status.code() == Code::InvalidArgument => {
                Ok(Placement::Refused(status.message().to_owned()))
            }
            // by another replica, which writes down what becomes of the purchase
            Err(status) if reason(&status) == "KEY_ABANDONED" => Ok(Placement::NotSent),
            Err(status) => Err(failure(NAME, &status)),
        }
    }

    /// Cancels an order that is not payed yet. `permit` is asked before each try.
    ///
    /// # Errors
    /// LOMS is away, busy or late; or what `permit` says.
    pub async fn cancel(
        &self,
        order: OrderId,
        deadline: Deadline,
        permit: Permit<'_>,
    ) -> Result<Cancellation, Error> {
        let message = pb::CancelOrderRequest { order_id: order.0 };
        let answer = self
            .ask_if(deadline, message, permit, |mut stub, request| async move {
                stub.cancel_order(request).await
            })
            .await;
        match answer {
            Ok(Tried::Answered(_)) => Ok(Cancellation::Done),
            Ok(Tried::Refrained) => Ok(Cancellation::NotSent),
            Ok(Tried::Failed(error)) => Err(error),
            Err(status) if status.code() == Code::FailedPrecondition => Ok(Cancellation::TooLate),
            Err(status) => Err(failure(NAME, &status)),
        }
    }

    /// The present status of a user's order. `None`: LOMS has no such order of this user.
    ///
    /// # Errors
    /// LOMS is away, busy or late.
    pub async fn status(
        &self,
        order: OrderId,
        user: UserId,
        deadline: Deadline,
    ) -> Result<Option<OrderStatus>, Error> {
        let message = pb::ListOrderRequest { order_id: order.0 };
        let answer = self
            .ask(deadline, message, |mut stub, request| async move {
                stub.list_order(request).await
            })
            .await;
        match answer {
            Ok(answer) if answer.user == user.get() => read_status(&answer.status).map(Some),
            Ok(_) => Ok(None),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(failure(NAME, &status)),
        }
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
        let call = &call;
        let answer = retry(deadline, again, |deadline| {
            let message = message.clone();
            async move {
                let client = self.connection(deadline).await?.client;
                let request = client.request(deadline, message);
                let answer = call(LomsClient::new(client.clone()), request);
                client.call(deadline, answer).await
            }
        });
        answer.await.inspect(|_| state(NAME).works())
    }

    /// Like [`Loms::ask`], where `permit` lets it; towards a LOMS that ignores keys once.
    async fn ask_if<M, T, F>(
        &self,
        deadline: Deadline,
        message: M,
        permit: Permit<'_>,
        call: impl Fn(LomsClient<Client>, Request<M>) -> F,
    ) -> Result<Tried<T>, Status>
    where
        M: Clone,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let once = AtomicBool::new(false);
        let again = |status: &Status| {
            let again = status.code() == Code::Unavailable && !once.load(Ordering::Relaxed);
            again.then_some(Duration::ZERO)
        };
        let (call, once) = (&call, &once);
        let answer = retry(deadline, again, |deadline| {
            let message = message.clone();
            async move {
                let connection = self.connection(deadline).await?;
                let keys = connection.keys(deadline).await?;
                self.note(keys);
                match permit(keys).await {
                    Ok(true) => once.store(keys == Keys::Ignored, Ordering::Relaxed),
                    Ok(false) => return Ok(Tried::Refrained),
                    Err(error) => return Ok(Tried::Failed(error)),
                }
                let client = connection.client;
                let request = client.request(deadline, message);
                let answer = call(LomsClient::new(client.clone()), request);
                client.call(deadline, answer).await.map(Tried::Answered)
            }
        });
        answer.await.inspect(|_| state(NAME).works())
    }

    fn note(&self, keys: Keys) {
        self.ignores_keys
            .store(keys == Keys::Ignored, Ordering::Relaxed);
        match keys {
            Keys::Kept => IGNORES_KEYS.works(),
            Keys::Ignored => IGNORES_KEYS.failed(&"it does not know AbandonOrder"),
        }
    }

    /// The connection, a new one if there is none.
    async fn connection(&self, deadline: Deadline) -> Result<Connection, Status> {
        let current = self.client.call(deadline, async {
            Ok(Response::new(self.connection.lock().await))
        });
        let mut current = current.await?;
        if let Some(connection) = &*current
            && !connection.client.is_closed()
        {
            return Ok(connection.clone());
        }
        let connection = Connection {
            client: self.client.one_connection(deadline).await?,
            keys: Arc::default(),
        };
        *current = Some(connection.clone());
        Ok(connection)
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
