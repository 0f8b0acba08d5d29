//! ProductService on the wire: it counts what it sees, and can be slow, limited, failing or hanging.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use proto::product::{self as pb, product_service_server as server};
use tokio::{net::TcpListener, task::JoinSet, time::Instant};
use tonic::{Code, Request, Response, Status, transport::server::TcpIncoming};

pub(crate) const TOKEN: &str = "testtoken";

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
        let stub = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(server::ProductServiceServer::new(stub.clone()))
            .serve_with_incoming(TcpIncoming::from(listener));
        serving.spawn(async move { server.await.unwrap() });
        (stub, address)
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

    pub(crate) fn requests(&self) -> usize {
        self.0.lock().unwrap().arrivals.len()
    }

    pub(crate) fn most_at_once(&self) -> usize {
        self.0.lock().unwrap().most_running
    }

    /// The most requests that arrived within any second.
    pub(crate) fn most_in_a_second(&self) -> usize {
        let arrivals = self.0.lock().unwrap().arrivals.clone();
        let second = Duration::from_secs(1);
        let from = |at: &Instant| {
            arrivals
                .iter()
                .filter(|a| **a >= *at && **a < *at + second)
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
        let pb::GetProductRequest { token, sku } = request.into_inner();
        let (_running, delay, failure) = {
            let mut state = self.0.lock().unwrap();
            state.arrivals.push(Instant::now());
            state.running += 1;
            state.most_running = state.most_running.max(state.running);
            *state.asked.entry(sku).or_default() += 1;
            let failure = state.always.or_else(|| state.failures.pop_front());
            (Running(self.clone()), state.delay, failure)
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
