// swift-tools-version:5.9
// A sample app over the package AHN: scripts/make-app.sh makes AHNSample.app of it, on a Mac.
import PackageDescription

let package = Package(
  name: "AHNSample",
  platforms: [.macOS(.v14)],
  dependencies: [.package(name: "AHN", path: "..")],
  targets: [
    .executableTarget(
      name: "AHNSample", dependencies: [.product(name: "AHN", package: "AHN")], path: "AHNSample")
  ]
)
