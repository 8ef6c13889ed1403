#![no_main]
libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    potluck::trial::folder(script);
});
