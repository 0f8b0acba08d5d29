//! A line to PostgreSQL that can be cut.

use std::net::SocketAddr;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// Passes on every connection; dropped, it takes all of them down and refuses new ones.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    _accepting: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn start(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut passing = JoinSet::new();
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let mut far = TcpStream::connect(&target).await.unwrap();
                passing
                    .spawn(async move { copy_bidirectional(&mut near, &mut far).await.map(drop) });
            }
        });
        Self {
            address,
            _accepting: accepting,
        }
    }
}
