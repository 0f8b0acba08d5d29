//! ProductService on the wire: it counts what it sees, refuses what is over its limits, and can be slow, failing or
//! hanging.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    ops::Range,
    sync::{Arc, Mutex},
    time::Duration,
};

use proto::product::{self as pb, product_service_server as server};
use tokio::{net::TcpListener, sync::oneshot, task::JoinSet, time::Instant};
use tonic::{
    Code, Request, Response, Status,
    metadata::MetadataMap,
    transport::{Identity, ServerTlsConfig, server::TcpIncoming},
};

pub(crate) const TOKEN: &str = "testtoken";

/// What the outside party allows, and answers RESOURCE_EXHAUSTED above: in any second, and at once.
pub(crate) const ALLOWED: (usize, usize) = (10, 5);
const SECOND: Duration = Duration::from_secs(1);

#[derive(Clone, Default)]
pub(crate) struct ProductsStub(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    arrivals: Vec<Instant>,
    running: usize,
    most_running: usize,
    asked: HashMap<u32, usize>,
    delay: Duration,
    prices: HashMap<u32, u32>,
    unknown: HashSet<u32>,
    failures: VecDeque<Code>,
    always: Option<Code>,
    limited: bool,
    refused: usize,
    last: MetadataMap,
}

impl State {
    fn is_over_its_limits(&self) -> bool {
        let now = Instant::now();
        let recent = self.arrivals.iter().rev();
        let in_this_second = recent.take_while(|at| now.duration_since(**at) < SECOND);
        self.limited && (in_this_second.count() > ALLOWED.0 || self.running > ALLOWED.1)
    }
}

/// Counts a request as running until it is answered or its caller has reset it.
struct Running(ProductsStub);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.0.lock().unwrap().running -= 1;
    }
}

impl ProductsStub {
    pub(crate) async fn start(serving: &mut JoinSet<()>) -> (Self, SocketAddr) {
        Self::start_with(serving, None).await
    }

    /// Over TLS, where it has an identity.
    pub(crate) async fn start_with(
        serving: &mut JoinSet<()>,
        identity: Option<Identity>,
    ) -> (Self, SocketAddr) {
        let stub = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        serving.spawn(stub.clone().serve(listener, identity));
        (stub, address)
    }

    /// On a thread of its own, so that when a request came is not said later because its callers are at work.
    pub(crate) async fn start_apart(serving: &mut JoinSet<()>) -> (Self, SocketAddr) {
        let stub = Self::default();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (open, closed) = oneshot::channel::<()>();
        // the thread ends with the set that the other stand-ins are in
        serving.spawn(async move {
            let _open = open;
            std::future::pending().await
        });
        let on_thread = stub.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).unwrap();
                tokio::select! {
                    () = on_thread.serve(listener, None) => {}
                    _ = closed => {}
                }
            });
        });
        (stub, address)
    }

    async fn serve(self, listener: TcpListener, identity: Option<Identity>) {
        let mut builder = tonic::transport::Server::builder();
        if let Some(identity) = identity {
            builder = builder
                .tls_config(ServerTlsConfig::new().identity(identity))
                .unwrap();
        }
        builder
            .add_service(server::ProductServiceServer::new(self))
            .serve_with_incoming(TcpIncoming::from(listener))
            .await
            .unwrap();
    }

    /// From now on what is over its limits is refused.
    pub(crate) fn limit(&self) {
        self.0.lock().unwrap().limited = true;
    }

    /// Somebody else with the same token has just used what a second allows.
    pub(crate) fn use_up(&self) {
        self.limit();
        let mut state = self.0.lock().unwrap();
        state.arrivals.extend([Instant::now(); ALLOWED.0]);
    }

    /// How many requests were over its limits.
    pub(crate) fn refused(&self) -> usize {
        self.0.lock().unwrap().refused
    }

    /// The metadata of the last request.
    pub(crate) fn last(&self) -> MetadataMap {
        self.0.lock().unwrap().last.clone()
    }

    pub(crate) fn delay(&self, delay: Duration) {
        self.0.lock().unwrap().delay = delay;
    }

    pub(crate) fn price(&self, sku: u32, price: u32) {
        self.0.lock().unwrap().prices.insert(sku, price);
    }

    pub(crate) fn unknown(&self, sku: u32) {
        self.0.lock().unwrap().unknown.insert(sku);
    }

    /// The next requests fail so, one after another.
    pub(crate) fn fail_next(&self, codes: &[Code]) {
        self.0.lock().unwrap().failures.extend(codes);
    }

    pub(crate) fn fail_always(&self, code: Option<Code>) {
        self.0.lock().unwrap().always = code;
    }

    /// How often it was asked for the SKU.
    pub(crate) fn asked(&self, sku: u32) -> usize {
        self.0.lock().unwrap().asked.get(&sku).copied().unwrap_or(0)
    }

    /// How often it was asked for one of these.
    pub(crate) fn asked_of(&self, skus: Range<u32>) -> usize {
        let state = self.0.lock().unwrap();
        let of_these = state.asked.iter().filter(|(sku, _)| skus.contains(sku));
        of_these.map(|(_, times)| times).sum()
    }

    pub(crate) fn requests(&self) -> usize {
        self.0.lock().unwrap().arrivals.len()
    }

    pub(crate) fn most_at_once(&self) -> usize {
        self.0.lock().unwrap().most_running
    }

    /// The most requests that arrived within any second.
    pub(crate) fn most_in_a_second(&self) -> usize {
        let arrivals = self.0.lock().unwrap().arrivals.clone();
        let from = |at: &Instant| {
            arrivals
                .iter()
                .filter(|a| **a >= *at && **a < *at + SECOND)
                .count()
        };
        arrivals.iter().map(from).max().unwrap_or(0)
    }
}

#[tonic::async_trait]
impl server::ProductService for ProductsStub {
    async fn get_product(
        &self,
        request: Request<pb::GetProductRequest>,
    ) -> Result<Response<pb::GetProductResponse>, Status> {
        let metadata = request.metadata().clone();
        let pb::GetProductRequest { token, sku } = request.into_inner();
        let (_running, delay, failure) = {
            let mut state = self.0.lock().unwrap();
            state.last = metadata;
            state.arrivals.push(Instant::now());
            state.running += 1;
            state.most_running = state.most_running.max(state.running);
            *state.asked.entry(sku).or_default() += 1;
            let failure = state.always.or_else(|| state.failures.pop_front());
            let running = Running(self.clone());
            if state.is_over_its_limits() {
                state.refused += 1;
                drop(state);
                return Err(Status::resource_exhausted("slow down"));
            }
            (running, state.delay, failure)
        };
        tokio::time::sleep(delay).await;
        if let Some(code) = failure {
            return Err(Status::new(code, "secret trouble"));
        }
        if token != TOKEN {
            return Err(Status::permission_denied("token"));
        }
        let state = self.0.lock().unwrap();
        if state.unknown.contains(&sku) {
            return Err(Status::not_found("sku"));
        }
        let price = state.prices.get(&sku).copied().unwrap_or(10);
        Ok(Response::new(pb::GetProductResponse {
            name: format!("product {sku}"),
            price,
        }))
    }

    async fn list_skus(
        &self,
        _: Request<pb::ListSkusRequest>,
    ) -> Result<Response<pb::ListSkusResponse>, Status> {
        Err(Status::unimplemented("checkout does not list"))
    }
}
