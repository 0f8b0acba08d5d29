//! LOMS on the wire: stock, orders by key, and every way to misbehave.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use pbjson_types::Empty;
use proto::loms::{self as pb, loms_server as server};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet};
use tonic::{
    Request, Response, Status,
    metadata::MetadataMap,
    transport::{Identity, ServerTlsConfig, server::TcpIncoming},
};

/// How it behaves towards everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Well,
    Away,
    Busy,
    Broken,
    Slow(Duration),
    /// Takes no order, for reasons of its own.
    Refusing,
    /// Places the order, then the answer is lost.
    LosesAnswers,
    /// Waits before it places an order, until released.
    HoldsBefore,
    /// Places the order, then waits with the answer until released.
    HoldsAfter,
    /// Does not say how an order stands.
    HidesOrders,
    /// Leaves an order that it places `new`; only one that ignores keys does that.
    LeavesNew,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) id: i64,
    pub(crate) user: i64,
    pub(crate) status: String,
    pub(crate) lines: Vec<(u32, u32)>,
    pub(crate) shortages: Vec<(u32, u64, u64)>,
}

#[derive(Clone)]
pub(crate) struct LomsStub(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    gate: Semaphore,
    arrived: Semaphore,
}

struct State {
    mood: Mood,
    stock: HashMap<u32, u64>,
    orders: BTreeMap<String, Order>,
    stock_calls: usize,
    order_calls: usize,
    placing: usize,
    most_placing: usize,
    last: MetadataMap,
}

/// Counts a CreateOrder as in progress until it is answered or its caller has left.
struct Placing(LomsStub);

impl Drop for Placing {
    fn drop(&mut self) {
        self.0.0.state.lock().unwrap().placing -= 1;
    }
}

impl LomsStub {
    pub(crate) async fn start(serving: &mut JoinSet<()>) -> (Self, SocketAddr) {
        Self::start_with(serving, None).await
    }

    /// Over TLS, with an identity.
    pub(crate) async fn start_with(
        serving: &mut JoinSet<()>,
        identity: Option<Identity>,
    ) -> (Self, SocketAddr) {
        let stub = Self(Arc::new(Inner {
            state: Mutex::new(State {
                mood: Mood::Well,
                stock: HashMap::new(),
                orders: BTreeMap::new(),
                stock_calls: 0,
                order_calls: 0,
                placing: 0,
                most_placing: 0,
                last: MetadataMap::new(),
            }),
            gate: Semaphore::new(0),
            arrived: Semaphore::new(0),
        }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut builder = tonic::transport::Server::builder();
        if let Some(identity) = identity {
            let tls = ServerTlsConfig::new().identity(identity);
            builder = builder.tls_config(tls).unwrap();
        }
        let server = builder
            .add_service(server::LomsServer::new(stub.clone()))
            .serve_with_incoming(TcpIncoming::from(listener));
        serving.spawn(async move { server.await.unwrap() });
        (stub, address)
    }

    pub(crate) fn mood(&self, mood: Mood) {
        self.0.state.lock().unwrap().mood = mood;
    }

    pub(crate) fn stock(&self, sku: u32, count: u64) {
        self.0.state.lock().unwrap().stock.insert(sku, count);
    }

    pub(crate) fn on_sale(&self, sku: u32) -> u64 {
        let state = self.0.state.lock().unwrap();
        state.stock.get(&sku).copied().unwrap_or(0)
    }

    /// Every order there is, in the order of their numbers.
    pub(crate) fn orders(&self) -> Vec<Order> {
        let mut orders: Vec<_> = self
            .0
            .state
            .lock()
            .unwrap()
            .orders
            .values()
            .cloned()
            .collect();
        orders.sort_by_key(|order| order.id);
        orders
    }

    pub(crate) fn keys(&self) -> Vec<String> {
        let state = self.0.state.lock().unwrap();
        state.orders.keys().cloned().collect()
    }

    pub(crate) fn stock_calls(&self) -> usize {
        self.0.state.lock().unwrap().stock_calls
    }

    pub(crate) fn order_calls(&self) -> usize {
        self.0.state.lock().unwrap().order_calls
    }

    /// The metadata of the last request for stock, or for an order.
    pub(crate) fn last(&self) -> MetadataMap {
        self.0.state.lock().unwrap().last.clone()
    }

    /// Somebody else pays, cancels, .. the order.
    pub(crate) fn set_status(&self, id: i64, status: &str) {
        self.change(id, |order| order.status = status.to_owned());
    }

    /// The number is that of another's order, as it may be in another LOMS.
    pub(crate) fn set_user(&self, id: i64, user: i64) {
        self.change(id, |order| order.user = user);
    }

    fn change(&self, id: i64, change: impl FnOnce(&mut Order)) {
        let mut state = self.0.state.lock().unwrap();
        let order = state.orders.values_mut().find(|order| order.id == id);
        change(order.unwrap());
    }

    /// Waits until a held call has come.
    pub(crate) async fn held(&self) {
        let arrived = tokio::time::timeout(Duration::from_secs(120), self.0.arrived.acquire());
        arrived.await.expect("a held call").unwrap().forget();
    }

    /// Lets held calls go on, these and all later ones.
    pub(crate) fn release(&self) {
        self.mood(Mood::Well);
        self.0.gate.add_permits(1000);
    }

    /// The most orders that were being placed at once.
    pub(crate) fn most_placing(&self) -> usize {
        self.0.state.lock().unwrap().most_placing
    }

    fn placing(&self) -> Placing {
        let mut state = self.0.state.lock().unwrap();
        state.order_calls += 1;
        state.placing += 1;
        state.most_placing = state.most_placing.max(state.placing);
        Placing(self.clone())
    }

    /// Lets the call go on that has been held longest; the mood stays.
    pub(crate) fn release_one(&self) {
        self.0.gate.add_permits(1);
    }

    pub(crate) fn mood_now(&self) -> Mood {
        self.0.state.lock().unwrap().mood
    }

    async fn wait(&self) {
        self.0.arrived.add_permits(1);
        self.0.gate.acquire().await.unwrap().forget();
    }

    pub(crate) async fn behave(&self) -> Result<(), Status> {
        match self.mood_now() {
            Mood::Away => Err(Status::unavailable("away")),
            Mood::Busy => Err(Status::resource_exhausted("busy")),
            Mood::Broken => Err(Status::internal("secret trouble")),
            Mood::Slow(by) => {
                tokio::time::sleep(by).await;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn place(&self, request: &pb::CreateOrderRequest) -> Order {
        let mut state = self.0.state.lock().unwrap();
        if let Some(order) = state.orders.get(&request.idempotency_key) {
            return order.clone();
        }
        let lines: Vec<_> = request
            .items
            .iter()
            .map(|item| (item.sku, item.count))
            .collect();
        let left = |sku: &u32| state.stock.get(sku).copied().unwrap_or(0);
        let shortages: Vec<_> = lines
            .iter()
            .filter(|(sku, count)| left(sku) < u64::from(*count))
            .map(|(sku, count)| (*sku, u64::from(*count), left(sku)))
            .collect();
        let status = if shortages.is_empty() {
            "awaiting payment"
        } else {
            "failed"
        };
        if shortages.is_empty() {
            for (sku, count) in &lines {
                *state.stock.entry(*sku).or_default() -= u64::from(*count);
            }
        }
        let order = Order {
            id: i64::try_from(state.orders.len()).unwrap() + 1,
            user: request.user,
            status: status.to_owned(),
            lines,
            shortages,
        };
        state
            .orders
            .insert(request.idempotency_key.clone(), order.clone());
        order
    }

    pub(crate) fn find(&self, id: i64) -> Result<Order, Status> {
        let found = self.orders().into_iter().find(|order| order.id == id);
        found.ok_or_else(|| Status::not_found("order"))
    }
}

#[tonic::async_trait]
impl server::Loms for LomsStub {
    async fn create_order(
        &self,
        request: Request<pb::CreateOrderRequest>,
    ) -> Result<Response<pb::CreateOrderResponse>, Status> {
        let _placing = self.placing();
        self.0.state.lock().unwrap().last = request.metadata().clone();
        self.behave().await?;
        let mood = self.mood_now();
        if mood == Mood::Refusing {
            return Err(Status::invalid_argument("no such order here"));
        }
        if mood == Mood::HoldsBefore {
            self.wait().await;
        }
        let request = request.into_inner();
        let order = self.place(&request);
        match mood {
            Mood::LosesAnswers => return Err(Status::unavailable("lost")),
            Mood::HoldsAfter => self.wait().await,
            _ => {}
        }
        let shortages = order
            .shortages
            .iter()
            .map(|(sku, requested, available)| pb::Shortage {
                sku: *sku,
                requested: *requested,
                available: *available,
            });
        Ok(Response::new(pb::CreateOrderResponse {
            order_id: order.id,
            status: order.status.clone(),
            shortages: shortages.collect(),
        }))
    }

    async fn list_order(
        &self,
        request: Request<pb::ListOrderRequest>,
    ) -> Result<Response<pb::ListOrderResponse>, Status> {
        self.behave().await?;
        if self.mood_now() == Mood::HidesOrders {
            return Err(Status::unavailable("hidden"));
        }
        let order = self.find(request.into_inner().order_id)?;
        Ok(Response::new(pb::ListOrderResponse {
            status: order.status,
            user: order.user,
            ..Default::default()
        }))
    }

    async fn order_payed(
        &self,
        _: Request<pb::OrderPayedRequest>,
    ) -> Result<Response<Empty>, Status> {
        Err(Status::unimplemented("checkout does not pay"))
    }

    async fn cancel_order(
        &self,
        request: Request<pb::CancelOrderRequest>,
    ) -> Result<Response<Empty>, Status> {
        self.behave().await?;
        let order = self.find(request.into_inner().order_id)?;
        match order.status.as_str() {
            "cancelled" => Ok(Response::new(Empty {})),
            "awaiting payment" => {
                self.set_status(order.id, "cancelled");
                for (sku, count) in order.lines {
                    self.stock(sku, self.on_sale(sku) + u64::from(count));
                }
                Ok(Response::new(Empty {}))
            }
            status => Err(Status::failed_precondition(status.to_owned())),
        }
    }

    async fn stocks(
        &self,
        request: Request<pb::StocksRequest>,
    ) -> Result<Response<pb::StocksResponse>, Status> {
        {
            let mut state = self.0.state.lock().unwrap();
            state.stock_calls += 1;
            state.last = request.metadata().clone();
        }
        self.behave().await?;
        let count = self.on_sale(request.into_inner().sku);
        // over two warehouses, as stock is
        let stocks = [(1, count / 2), (2, count - count / 2)]
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(warehouse_id, count)| pb::Stock {
                warehouse_id,
                count,
            });
        Ok(Response::new(pb::StocksResponse {
            stocks: stocks.collect(),
        }))
    }

    async fn receive_stock(
        &self,
        _: Request<pb::ReceiveStockRequest>,
    ) -> Result<Response<pb::ReceiveStockResponse>, Status> {
        Err(Status::unimplemented("checkout does not receive"))
    }

    async fn abandon_order(
        &self,
        request: Request<pb::AbandonOrderRequest>,
    ) -> Result<Response<pb::AbandonOrderResponse>, Status> {
        let asked = request.into_inner();
        assert_eq!(asked, pb::AbandonOrderRequest::default(), "a question only");
        Err(Status::invalid_argument("user, key, time"))
    }
}
