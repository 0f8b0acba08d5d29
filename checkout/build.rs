//! `migrate!` reads the migrations when it is compiled, and cargo does not see that by itself.

fn main() {
    println!("cargo:rerun-if-changed=../migrations/checkout");
}
