//! Rebuilds the crate when a migration changes: `migrate!` embeds the folder and would not notice a new file.

fn main() {
    println!("cargo:rerun-if-changed=../migrations/notifications");
}
