#include "tests.h"

int main() {
  std::printf("floats: %d cases\n", test_floats());
  std::printf("digest: %d cases\n", test_digest());
  std::printf("packing: %d cases\n", test_packing());
  std::printf("encoding: %d cases\n", test_encoding());
  std::printf("heads: %d cases\n", test_heads());
  return 0;
}
