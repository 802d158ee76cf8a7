//! The tests of the program, a module for each subject. They are one binary, because each one more links the whole engine and has the
//! machine to itself while its last test runs.

mod cuda_faults;
mod distill;
mod frozen;
mod health;
mod hostile;
mod place;
mod program;
mod routes;
mod study;
mod vulkan_faults;
